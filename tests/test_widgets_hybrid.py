"""Ways of sharing work over saved rows."""

import html
import json
import re
import subprocess
import sys

import pytest

from edgelab import ledger
from edgelab.devices.prices import prices
from edgelab.ledger import Row
from edgelab.rows import NotMeasured
from edgelab.widgets.hybrid import UNCOUNTED, cloud_trip, edge_energy
from tests.controls import control

EDGE = "prune.layers:drop=13/14/15"
SCORES = {"margin": [0.9, 0.1, 0.5, 0.3], "mean": [-0.1, -0.2, -0.3, -0.4]}


def of_requests(runtime, right, sent, ms, edge_ms, weights=EDGE, **more):
    """A row of four requests."""
    link = more.pop("link", "wifi")
    each = {
        "scores": more.pop("scores", {}),
        "sent": sent,
        "ms": ms,
        "edge_ms": edge_ms,
        **more.pop("each", {}),
    }
    fields = {
        "sent_bytes_per_request": 1000.0, "received_bytes_per_request": 500.0, "usd_per_1k_requests": 0.02,
        "edge_j_per_request": 0.0, **more,
    }  # fmt: skip
    if "1" not in sent:
        fields |= {
            "sent_bytes_per_request": 0.0,
            "received_bytes_per_request": 0.0,
            "usd_per_1k_requests": 0.001,
        }
        fields["edge_j_per_request"] = 0.7
    return Row(
        f"{weights} @ {runtime}", runtime=runtime, link=link, requests=right.count("1") / 4, requests_items=4,
        requests_right=right, served=json.dumps(each), host="here", threads=1, **fields,
    )  # fmt: skip


def drafted(draft):
    runtime = f"speculative:cloud=(none),link=wifi,draft={draft}"
    return of_requests(runtime, "1100", "1111", [10.0 * draft] * 4, [5.0] * 4, each={"rounds": 14})


def policy(name, leaked, right, ms, share):
    runtime = f"redact:cloud=(none),link=wifi,policy={name}"
    return Row(
        f"{EDGE} @ {runtime}", runtime=runtime, leaked_share=leaked, private_right=right, private_ms_p50=ms,
        private_cloud_share=share, host="here", threads=1,
    )  # fmt: skip


@pytest.fixture
def rows():
    own = [100.0, 200.0, 100.0, 300.0]
    return [
        of_requests("cascade:cloud=(none),link=wifi,share=0.0", "1001", "0000", own, own, scores=SCORES),
        of_requests("cloud:cloud=(none),link=wifi", "1100", "1111", [50.0, 80.0, 60.0, 70.0], [0.0] * 4),
        of_requests("cascade:cloud=(none),link=wifi", "1101", "0100", [100.0, 285.0, 100.0, 300.0], own,
                    scores=SCORES),
        *map(drafted, (2, 12, 4)),
        of_requests("split:link=wifi,cut=5", "1110", "1111", [400.0] * 4, [100.0] * 4, weights="none"),
        policy("edge", 0.0, 0.25, 90.0, 0.0),
        policy("redact", 0.1, 0.5, 150.0, 1.0),
        policy("cloud", 1.0, 0.75, 140.0, 1.0),
    ]  # fmt: skip


def cells(box):
    """The table as text: its lines by their heads."""
    lines = re.findall(r"<tr><td>(.*?)</td>(.*?)</tr>", box.children[-2].value)
    return {head: re.findall(r"<t[dh][^>]*>(?:<b>)?(.*?)(?:</b>)?</t[dh]>", rest) for head, rest in lines}


def test_a_threshold_moves_along_the_curve(rows):
    box = cloud_trip(ledger.frame(rows))
    slider = control(box, "Threshold")
    slider.value = 0.4
    found = cells(box)
    assert found[""] == ["edge only", "cascade", "cloud only"]
    assert found["Right answers"] == ["50.0%", "50.0%", "50.0%"]
    assert found["Answered by the cloud"] == ["0%", "50%", "100%"]
    assert found["Time, median (ms)"] == ["150", "190", "65"]
    assert found["Sent to the cloud (bytes)"] == ["0", "500", "1,000"]
    assert found["1,000 requests (USD)"] == ["0.0010", "0.0110", "0.0200"]
    assert found["Energy at the edge (J)"] == ["0.70", "0.70", "0.00"]
    assert found["Data with a form that leaves"] == ["0%", "–", "100%"]
    assert found["Times"] == ["measured", "from both rows", "measured"]
    assert "50% of the requests have a score below 0.400 and go to the cloud" in box.children[-2].value
    before = box.children[-1].value
    slider.value = 0.2
    assert cells(box)["Right answers"][1] == "75.0%" and "25 % go to the cloud" in box.children[-1].value
    assert box.children[-1].value != before
    slider.value = slider.min
    assert cells(box)["Answered by the cloud"][1] == "0%"
    slider.value = slider.max
    assert cells(box)["Answered by the cloud"][1] == "100%"


def test_another_score_has_a_slider_of_its_own(rows):
    box = cloud_trip(ledger.frame(rows))
    control(box, "Doubt by").value = "mean"
    slider = control(box, "Threshold")
    assert slider.min <= -0.4 <= slider.value <= -0.1 < slider.max
    slider.value = -0.25
    assert cells(box)["Right answers"][1] == "25.0%"  # the last two are sent, and the cloud gets both wrong


def test_another_link_is_predicted_and_says_so(rows):
    box = cloud_trip(ledger.frame(rows))
    control(box, "Threshold").value = 0.4
    assert control(box, "Link").value == "wifi"  # the one that was measured
    control(box, "Link").value = "lte"
    found = cells(box)
    assert found["Times"] == ["measured", "from both rows, link predicted", "predicted"]
    assert found["Time, median (ms)"] == ["150", "224", "133"]  # 68.3 ms more for what is sent
    control(box, "Way").value = "drafting"
    assert cells(box)["Times"][1] == "predicted"
    two = of_requests("cloud:cloud=(none),link=lte", "1100", "1111", [200.0] * 4, [0.0] * 4, link="lte")
    box = cloud_trip(ledger.frame([*rows, two]))
    control(box, "Link").value = "lte"
    assert cells(box)["Times"] == ["measured", "from both rows", "measured"]
    assert cells(box)["Time, median (ms)"][2] == "200"


def test_drafts_splits_and_ends_have_their_rows(rows):
    box = cloud_trip(ledger.frame(rows))
    way, which = control(box, "Way"), control(box, "Which")
    assert way.options == ("edge only", "cloud only", "cascade", "drafting", "split", "redact")
    assert which.layout.display == "none"
    way.value = "drafting"
    assert which.options == ("2 tokens", "4 tokens", "12 tokens") and which.layout.display is None
    assert control(box, "Threshold").layout.display == "none"
    which.value = "12 tokens"
    assert cells(box)["Time, median (ms)"] == ["150", "120", "65"]
    way.value = "split"
    assert which.options == ("baseline behind layer 5, float16 states",)
    assert cells(box)["Right answers"][1] == "75.0%"
    assert "from which a prompt can be read" in box.children[-2].value
    way.value = "cloud only"
    assert cells(box)[""] == ["edge only", "cloud only"]
    assert 'data-share="1.000000"' in box.children[-2].value


def test_policies_are_beside_theirs_and_not_predicted(rows):
    box = cloud_trip(ledger.frame(rows))
    control(box, "Way").value = "redact"
    control(box, "Which").value = "redact"
    found = cells(box)
    assert found[""] == ["edge only", "policy redact", "cloud only"]
    assert found["Data with a form that leaves"] == ["0%", "10%", "100%"]
    assert found["Right answers"] == ["25.0%", "50.0%", "75.0%"]
    assert found["Time, median (ms)"] == ["90", "150", "140"] and "Time, 95 % (ms)" not in found
    assert control(box, "Which").options == ("redact",)  # the others are beside it
    control(box, "Link").value = "lte"
    assert cells(box)["Time, median (ms)"] == ["90", "–", "–"]
    assert cells(box)["Times"] == ["measured", "measured over wifi only", "measured over wifi only"]
    assert box.children[-1].value == ""


def counted(name, leaked, right, ms, share, n_bytes, usd, edge_ms, stated_j=None):
    """A policy's row with all that is counted."""
    row = policy(name, leaked, right, ms, share)
    row.private_ms_p95, row.private_edge_j = 2 * ms, stated_j
    row.private_sent_bytes, row.private_received_bytes, row.private_usd_per_1k = n_bytes, n_bytes / 2, usd
    row.private = json.dumps({"items": 2, "edge_ms": edge_ms})
    return row


def test_policies_have_bytes_price_and_energy(rows):
    newer = [
        counted("edge", 0.0, 0.25, 90.0, 0.0, 0.0, 0.0, [80.0, 120.0]),
        counted("redact", 0.1, 0.5, 150.0, 1.0, 1200.0, 0.03, [10.0, 30.0]),
        counted("cloud", 1.0, 0.75, 140.0, 1.0, 1000.0, 0.02, [0.0, 0.0], stated_j=0.25),
    ]
    box = cloud_trip(ledger.frame([*rows[:-3], *newer]))
    control(box, "Way").value = "redact"
    found = cells(box)
    assert found["Time, 95 % (ms)"] == ["180", "300", "280"]
    assert found["Sent to the cloud (bytes)"] == ["0", "1,200", "1,000"]
    assert found["Received (bytes)"] == ["0", "600", "500"]
    assert found["1,000 requests (USD)"] == ["0.0000", "0.0300", "0.0200"]
    assert found["Energy at the edge (J)"] == ["0.50", "0.10", "0.25"]
    assert found["Energy"] == ["estimated: 5 W x 100 ms", "estimated: 5 W x 20 ms", "as the row says"]
    assert UNCOUNTED not in html.unescape(box.children[-2].value)
    control(box, "Link").value = "lte"
    found, dearer = cells(box), 1e3 * 1800 / 1e9 * prices().data["lte"]
    assert found["Time, 95 % (ms)"] == ["180", "–", "–"]  # nothing travels for the first
    assert found["Sent to the cloud (bytes)"] == ["0", "1,200", "1,000"]
    assert found["1,000 requests (USD)"][:2] == ["0.0000", f"{0.03 + dearer:.4f}"]


def test_policies_of_before_say_what_they_lack(rows):
    box = cloud_trip(ledger.frame(rows))
    control(box, "Way").value = "redact"
    assert UNCOUNTED in html.unescape(box.children[-2].value)
    assert not {"Sent to the cloud (bytes)", "1,000 requests (USD)", "Energy"} & set(cells(box))


def test_energy_is_what_a_row_says_or_power_times_the_time_of_the_edge():
    assert edge_energy(0.7, [100.0], 5.0) == (0.7, "as the row says")
    joules, basis = edge_energy(None, [100.0, 300.0], 4.0)
    assert joules == pytest.approx(0.8) and basis == "estimated: 4 W x 200 ms"
    assert edge_energy(None, [0.0, 0.0], 4.0) == (0.0, "the edge does not compute")
    assert edge_energy(None, [100.0], 0.0) == edge_energy(None, [], 4.0) == (None, "")


def test_saved_rows_without_energy_have_it_from_a_power(rows):
    for row in rows:
        row.edge_j_per_request = None
    box = cloud_trip(ledger.frame(rows))
    power = control(box, "Power of the edge, W")
    assert power.value == 5.0
    found = cells(box)  # the edge takes 175 ms on average, also before a request is sent
    assert found["Energy at the edge (J)"] == ["0.88", "0.88", "0.00"]
    assert found["Energy"] == ["estimated: 5 W x 175 ms"] * 2 + ["the edge does not compute"]
    power.value = 2
    assert cells(box)["Energy at the edge (J)"] == ["0.35", "0.35", "0.00"]
    control(box, "Way").value = "split"
    assert cells(box)["Energy at the edge (J)"][1] == "0.20"
    power.value = 0
    assert not {"Energy", "Energy at the edge (J)"} & set(cells(box))


def test_a_power_moves_no_energy_that_a_row_says(rows):
    box = cloud_trip(ledger.frame(rows))
    before = cells(box)
    assert before["Energy"] == ["as the row says"] * 3
    control(box, "Power of the edge, W").value = 50
    assert cells(box) == before


def test_a_policy_is_that_of_the_chosen_link(rows):
    """A newer row over another link does not take the place of the chosen one, whether rows name links or not."""
    for named in ("wifi", None):
        here, away = policy("redact", 0.1, 0.5, 150.0, 1.0), policy("redact", 0.1, 0.75, 900.0, 1.0)
        away.recipe = away.recipe.replace("link=wifi", "link=lte")
        here.link, away.link = named, named and "lte"
        box = cloud_trip(ledger.frame([*rows[:-3], here, away]))
        control(box, "Way").value = "redact"
        assert cells(box)["Time, median (ms)"] == ["–", "150", "–"]
        control(box, "Link").value = "lte"
        assert cells(box)["Time, median (ms)"] == ["–", "900", "–"]


def test_the_edge_alone_is_the_row_without_a_choice_of_the_score(rows):
    """A later row of the same requests has times of its own; the table of rows shows the first one."""
    own = [50.0] * 4
    later = "cascade:cloud=(none),link=wifi,score=router,share=0.0"
    box = cloud_trip(ledger.frame([*rows, of_requests(later, "1001", "0000", own, own, scores=SCORES)]))
    assert cells(box)["Time, median (ms)"][0] == "150"


@pytest.mark.parametrize(
    ("runtime", "share"),
    [
        ("cloud:cloud=(none),link=lte", 1.0),
        ("cascade:cloud=(none),link=lte", 1.0),
        ("speculative:cloud=(none),link=lte,draft=9", 1.0),
        ("speculative:cloud=(none),link=lte,draft=9", None),  # the way says it, where the row does not
    ],
)
def test_a_cloud_that_never_answered_is_neither_end(rows, runtime, share):
    """Each request waits for its deadline, and the edge answers in the end, with scores."""
    lost = of_requests(
        runtime, "1001", "0000", [1900.0] * 4, [100.0] * 4, scores=SCORES, link="lte", alone_share=share
    )
    box = cloud_trip(ledger.frame([*rows, lost]))
    control(box, "Link").value = "lte"
    found = cells(box)
    assert found["Time, median (ms)"][0] == "150" and found["Answered by the cloud"][2] == "100%"
    for other, missing in ((rows[1], "the edge alone"), (rows[0], "the cloud alone")):
        with pytest.raises(NotMeasured, match=missing):
            cloud_trip(ledger.frame([lost, other]))


def test_a_split_whose_cloud_is_down_has_no_time(rows):
    gone = of_requests(
        "split:link=wifi,cut=5", "0000", "0000", [0.1] * 4, [0.1] * 4, weights="none",
        each={"answered": "0000"}, unanswered_share=1.0,
    )  # fmt: skip
    box = cloud_trip(ledger.frame([*rows[:6], gone]))
    control(box, "Way").value = "split"
    assert cells(box)["Time, median (ms)"] == ["150", "–", "65"]


def test_the_edge_that_most_was_measured_with_comes_first(rows):
    other = of_requests(
        "torch", "1111", "0000", [10.0] * 4, [10.0] * 4, weights="none", scores=SCORES, link=None
    )
    box = cloud_trip(ledger.frame([other, *rows]))
    edge = control(box, "Edge")
    assert (edge.value, edge.layout.display) == (EDGE, None) and control(
        box, "Cloud"
    ).layout.display == "none"
    assert cells(box)["Right answers"][0] == "50.0%"
    edge.value = "none"
    assert cells(box)["Right answers"][0] == "100.0%"
    assert control(box, "Way").options == ("edge only", "cloud only", "cascade", "split")


def test_ways_without_rows_are_not_offered(rows):
    box = cloud_trip(ledger.frame(rows[:2]))
    assert control(box, "Way").options == ("edge only", "cloud only", "cascade")
    assert "Data with a form that leaves" not in cells(box)


@pytest.mark.parametrize(("kept", "said"), [(slice(1, 2), "the edge alone"), (slice(0, 1), "the cloud alone"),
                                            (slice(0, 0), "the edge alone")])  # fmt: skip
def test_what_has_to_be_measured_first(rows, kept, said):
    with pytest.raises(NotMeasured, match=f"has {said}: measure"):
        cloud_trip(ledger.frame(rows[kept]))


def test_rows_of_other_requests_are_one_sentence(rows):
    short = of_requests("cloud:cloud=(none),link=wifi", "110", "111", [50.0, 80.0, 60.0], [0.0] * 3)
    box = cloud_trip(ledger.frame([rows[0], short]))
    assert "should be of the same items" in box.children[-2].value and box.children[-1].value == ""


def test_times_of_two_machines_make_no_sum(rows):
    rows[1].host = "elsewhere"
    with pytest.raises(NotMeasured, match="the cloud alone"):
        cloud_trip(ledger.frame(rows))


def test_saved_rows_are_shown_without_torch(rows, tmp_path):
    ledger.frame(rows).to_pickle(tmp_path / "rows.pickle")
    code = (
        "import sys, pandas\nfrom edgelab.widgets.hybrid import cloud_trip\n"
        "from edgelab.widgets.live_request import live_request\n"
        "cloud_trip(pandas.read_pickle('rows.pickle'))\nlive_request()\n"
        "found = {'torch', 'transformers', 'datasets'} & sys.modules.keys()\nsys.exit(str(found) if found else 0)"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
