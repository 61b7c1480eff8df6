"""Pictures of edge and cloud together, from data written by hand: what is drawn, named and said, what is left out."""

import json
import math

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from edgelab import plots
from edgelab.deployments.hybrid.routing.gap import RoutingError
from edgelab.deployments.hybrid.speculation.acceptance import SpeculationError, pipelined_ms
from edgelab.plots import NothingToDraw

EDGE, CLOUD, WAITING, NOBODY = "#009e73", "#0072b2", "#b0b0b0", "#d55e00"
TECHNIQUES = "prune.layers:keep=0,drop=13/14/15"


def texts(figure, place=0):
    return [text.get_text() for text in figure.axes[place].texts]


def title(figure, place=0):
    return figure.axes[place].get_title(loc="left")


def bars(axes):
    """Of each bar its place, begin, end and colour."""
    found = [(one.get_y() + one.get_height() / 2, one.get_x(), one.get_width(), one) for one in axes.patches]
    return [
        (round(y), round(x, 6), round(x + width, 6), to_hex(one.get_facecolor()))
        for y, x, width, one in found
    ]


def row(recipe, **fields):
    known = dict(
        recipe=recipe, family="prune", model="tiny", badge="packed", host="laptop", status="ok", fast=False,
        source="reader", started_at="2026-11-23T10:00:00", corpus="wiki", requests_items=320,
    )  # fmt: skip
    return known | fields


def answered(recipe, right, p50, p95=math.nan, **fields):
    return row(recipe, requests=right, request_ms_p50=p50, request_ms_p95=p95, **fields)


def redacted(policy, leaked, right, ms=500.0, items=100, **fields):
    recipe = f"{TECHNIQUES} @ redact:cloud=(none),link=lte,policy={policy}"
    private = json.dumps({"items": items})
    return row(recipe, leaked_share=leaked, private_right=right, private_ms_p50=ms, private=private, **fields)


# Time lines


def test_a_time_line_has_a_bar_for_each_span_and_the_whole_time_behind_it():
    spans = {
        "cascade": [("edge", 0.0, 0.2), ("cloud", 0.2, 0.5)],
        "cloud gone": [("waiting", 0.0, 1.0), ("edge", 1.0, 1.25)],
    }
    figure = plots.time_line(spans, "A request")
    axes = figure.axes[0]
    assert bars(axes) == [
        (0, 0, 200, EDGE), (0, 200, 500, CLOUD), (1, 0, 1000, WAITING), (1, 1000, 1250, EDGE)
    ]  # fmt: skip
    assert texts(figure) == ["500 ms", "1,250 ms"]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == list(spans)
    assert title(figure) == "A request" and axes.get_xlabel().endswith("(ms)")
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "the edge computes", "on the way or in the cloud", "waiting in vain"
    ]  # fmt: skip


def test_neighbours_of_one_kind_are_one_bar_and_gaps_stay():
    spans = [("cloud", 0.3, 0.4), ("edge", 0.0, 0.1), ("edge", 0.1, 0.2), ("cloud", 0.5, 0.6)]
    axes = plots.time_line({"drafts": spans}).axes[0]
    assert bars(axes) == [(0, 0, 200, EDGE), (0, 300, 400, CLOUD), (0, 500, 600, CLOUD)]


def test_long_requests_are_in_seconds_and_a_way_without_spans_has_no_answer():
    figure = plots.time_line({"3g": [("cloud", 0, 2.5)], "split": []})
    assert texts(figure) == ["2.50 s", "no answer"]
    assert bars(figure.axes[0]) == [(0, 0, 2.5, CLOUD)]
    for empty in ({}, {"split": []}):
        with pytest.raises(NothingToDraw, match="no request has been answered"):
            plots.time_line(empty)


# Routing


def routed_items():
    """40 items that a score tells apart: the edge gets the surer half right, the cloud three quarters in each half."""
    edge = np.arange(40) >= 20
    cloud = np.arange(40) % 4 > 0
    return edge, cloud, np.arange(40.0)


def line_of(axes, colour, **look):
    """The line of a colour, of those that are more than a point."""
    found = [one for one in axes.lines if to_hex(one.get_color()) == colour and len(one.get_xdata()) > 1]
    return [
        one for one in found if all(getattr(one, f"get_{name}")() == value for name, value in look.items())
    ]


def test_deferral_goes_from_the_edge_to_the_cloud_by_each_score():
    edge, cloud, score = routed_items()
    figure = plots.deferral(edge, cloud, {"margin": score, "backwards": -score})
    axes = figure.axes[0]
    (margin,), (backwards,) = line_of(axes, "#d55e00"), line_of(axes, "#cc79a7")
    for line in (margin, backwards):
        np.testing.assert_allclose(line.get_xydata()[[0, -1]], [(0, 50), (100, 75)])
    # all that the edge gets wrong is sent first: 15 of 20 become right, 50 + 100 * 15 / 40
    assert np.interp(50, *margin.get_xydata().T) == pytest.approx(87.5)
    assert np.interp(50, *backwards.get_xydata().T) == pytest.approx(37.5)  # 5 of 20 become wrong
    assert margin.get_linewidth() > backwards.get_linewidth()
    (random,) = line_of(axes, "#000000")
    np.testing.assert_allclose(random.get_xydata(), [(0, 50), (100, 75)])
    (oracle,) = line_of(axes, "#6b6b6b")
    np.testing.assert_allclose(oracle.get_xydata(), [(0, 50), (37.5, 87.5), (87.5, 87.5), (100, 75)])
    names = {"random", "oracle", "margin", "backwards", "edge alone, 50.0 %", "cloud alone, 75.0 %"}
    assert set(texts(figure)) == names
    assert title(figure).startswith("By margin, ") and "at random 50 %" in title(figure)


def test_a_gap_that_is_not_clear_is_said_and_no_score_is_named_best():
    edge, _, score = routed_items()
    figure = plots.deferral(edge, edge, {"margin": score})
    assert title(figure) == "What sending requests away buys"
    assert "not clear of zero" in figure.get_supxlabel()
    one = plots.deferral([False], [True], {})
    assert set(texts(one)) == {"random", "oracle", "edge alone, 0.0 %", "cloud alone, 100.0 %"}


def test_deferral_refuses_nothing_and_scores_without_a_value():
    edge, cloud, score = routed_items()
    with pytest.raises(NothingToDraw, match="no request"):
        plots.deferral([], [], {"margin": []})
    with pytest.raises(RoutingError, match="finite"):
        plots.deferral(edge, cloud, {"margin": np.where(score > 3, score, np.nan)})


def test_reliability_counts_the_items_of_each_bin():
    # 4 items at 0.25, of which one is right; 2 at 0.95, both right
    figure = plots.reliability([0.25] * 4 + [0.95] * 2, [1, 0, 0, 0, 1, 1])
    points = [line.get_xydata() for line in figure.axes[0].lines if line.get_marker() == "o"]
    np.testing.assert_allclose(points, [[(25, 25), (95, 100)]])
    assert texts(figure, 1) == ["4", "2"]
    heights = [(bar.get_x() + bar.get_width() / 2, bar.get_height()) for bar in figure.axes[1].patches]
    np.testing.assert_allclose(heights, [(25, 4), (95, 2)])
    assert "as often right as said" in texts(figure)
    # off by 0 at 0.25 and 0.05 at 0.95, weighted: 2 / 6 * 5 points
    assert title(figure).startswith("Probabilities are off by 1.7 points")


def test_reliability_of_one_item_of_none_and_of_no_probabilities():
    assert texts(plots.reliability([0.7], [True]), 1) == ["1"]
    with pytest.raises(NothingToDraw, match="no answer"):
        plots.reliability([], [])
    with pytest.raises(RoutingError):
        plots.reliability([0.5, math.nan], [True, False])


# Drafting

# Two tokens drafted in 10 ms each, all accepted: 3 tokens in 20 + 16 + round trip, so 12 ms each, and 20 from 24 ms on.
ALL_RIGHT = dict(draft_ms=10, verify_ms=16, target_ms=20, acceptance=1.0, draft=2)


def courses(figure):
    return {
        to_hex(line.get_color()): line.get_xydata()
        for line in figure.axes[0].lines
        if len(line.get_xdata()) > 1
    }


def marked(figure, marker):
    return [line.get_xydata()[0] for line in figure.axes[0].lines if line.get_marker() == marker]


def test_the_round_trip_where_drafting_stops_winning_is_marked():
    figure = plots.draft_break_even(**ALL_RIGHT, round_trips_ms=[0, 50])
    drawn = courses(figure)
    np.testing.assert_allclose(drawn[CLOUD][:, 1], 20)
    np.testing.assert_allclose(drawn["#cc79a7"][:, 1], 12)  # in the cloud, whatever the link
    np.testing.assert_allclose(drawn[EDGE][[0, -1]], [(0, 12), (50, 86 / 3)])
    # pipelined, 3 tokens while 16 ms + round trip pass, at least three steps: 10 ms, and 20 from 44 ms on
    np.testing.assert_allclose(drawn["#e69f00"][[0, -1]], [(0, 10), (50, 22)])
    np.testing.assert_allclose(marked(figure, "D"), [(24, 20), (44, 20)], rtol=1e-5)
    assert {"24 ms", "44 ms", "streamed from the cloud, 20 ms", "drafted in the cloud, 12 ms"} <= set(
        texts(figure)
    )
    assert title(figure) == (
        "Drafting at the edge beats streaming up to a round trip of 24 ms, pipelined up to 44 ms"
    )
    outside = plots.draft_break_even(**ALL_RIGHT, round_trips_ms=[1, 10])
    assert not marked(outside, "D") and title(outside) == title(figure)


def test_where_pipelining_stops_winning_its_time_crosses_that_of_streaming():
    about = dict(draft_ms=11.0, verify_ms=35.0, target_ms=32.0, acceptance=0.7, draft=4)
    figures = [about[name] for name in ("acceptance", "draft", "draft_ms", "verify_ms")]
    _, (trip, height) = marked(plots.draft_break_even(**about, round_trips_ms=[0, 100]), "D")
    assert height == 32.0
    assert pipelined_ms(*figures, trip - 1e-2) < 32.0 <= pipelined_ms(*figures, trip + 1e-2)


def test_a_title_says_that_drafting_never_wins_or_only_pipelined():
    # nothing accepted: one token for each draft
    never = plots.draft_break_even(10, 16, 20, 0.0, 2, [0, 50])
    assert title(never) == "Drafting at the edge never beats streaming, however short the round trip"
    assert not marked(never, "D")
    # 3 tokens: plain 36 / 3 = 12 ms, pipelined 10 ms
    only = plots.draft_break_even(**ALL_RIGHT | {"target_ms": 11}, round_trips_ms=[0, 50])
    assert title(only) == "Drafting at the edge beats streaming only pipelined, up to a round trip of 17 ms"
    assert [float(point[0]) for point in marked(only, "D")] == pytest.approx([17], rel=1e-4)


def test_measured_times_are_points_and_those_without_a_value_are_not():
    measured = pd.DataFrame(
        {
            "round_trip_ms": [2, 70, 2, 300],
            "way": ["drafted", "drafted", "streamed", "co-located"],
            "ms_per_token": [14.0, 33.0, 21.0, None],
        }
    )
    figure = plots.draft_break_even(**ALL_RIGHT, round_trips_ms=[0.5, 2, 70, 300], measured=measured)
    points = {
        to_hex(line.get_color()): line.get_xydata().tolist()
        for line in figure.axes[0].lines
        if line.get_marker() == "o"
    }
    assert points[EDGE] == [[2, 14], [70, 33]] and points[CLOUD] == [[2, 21]] and points["#cc79a7"] == []
    assert figure.axes[0].get_xscale() == "log"
    assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == ["0.5", "2", "70", "300"]
    assert "Points: measured." in figure.get_supxlabel()
    bare = plots.draft_break_even(**ALL_RIGHT, round_trips_ms=[30], measured=measured[:0])
    assert "measured" not in bare.get_supxlabel() and courses(bare)[CLOUD][:, 0].max() == 30


def test_lines_leave_the_picture_where_drafting_has_long_lost():
    figure = plots.draft_break_even(**ALL_RIGHT, round_trips_ms=[0, 4000])
    assert figure.axes[0].get_ylim() == (0, 60) and "drafted at the edge" in texts(figure)


def test_drafting_without_round_trips_or_with_an_impossible_acceptance():
    with pytest.raises(NothingToDraw, match="no round trip"):
        plots.draft_break_even(**ALL_RIGHT, round_trips_ms=[])
    with pytest.raises(SpeculationError):
        plots.draft_break_even(10, 16, 20, 1.5, 2, [0, 50])


# Exposure


def test_each_wire_format_has_a_panel_with_means_over_prompts():
    found = pd.DataFrame(
        [
            ("float16", 1, 0.8, 1.0), ("float16", 1, 0.6, 1.0), ("float16", 15, 0.1, 1.0),
            ("int4", 1, 0.5, 0.9), ("int4", 15, None, 0.25), ("int4", 20, None, None),
        ],
        columns=["wire", "cut", "nearest", "search"],
    )  # fmt: skip
    figure = plots.exposed(found)
    assert [title(figure, place) for place in range(2)] == [
        "float16\nsearch finds all", "int4\nsearch finds 25 % or more"
    ]  # fmt: skip
    drawn = [{to_hex(line.get_color()): line.get_xydata() for line in axes.lines} for axes in figure.axes]
    np.testing.assert_allclose(drawn[0][CLOUD], [(1, 70), (15, 10)])
    np.testing.assert_allclose(drawn[0][NOBODY], [(1, 100), (15, 100)])
    np.testing.assert_allclose(drawn[1][CLOUD], [(1, 50)])
    np.testing.assert_allclose(drawn[1][NOBODY], [(1, 90), (15, 25)])
    assert all(set(texts(figure, place)) == {"search", "nearest state"} for place in range(2))


def test_one_attack_is_a_point_and_none_is_refused():
    found = pd.DataFrame([("int8", 5, 0.4, None)], columns=["wire", "cut", "nearest", "search"])
    figure = plots.exposed(found)
    assert texts(figure) == ["nearest state"] and title(figure) == "int8"
    for empty in (found[:0], found.assign(nearest=None)):
        with pytest.raises(NothingToDraw, match="no prompt has been read back"):
            plots.exposed(empty)


# Policies


def places(figure):
    """Where the points of rows are."""
    return [
        tuple(one.get_offsets()[0].round(6))
        for one in figure.axes[0].collections
        if len(one.get_offsets()) == 1
    ]


def test_policies_are_points_with_their_time_and_interval():
    figure = plots.policies(
        [redacted("edge", 0, 0.4, 300), redacted("redact", 0.05, 0.6), redacted("cloud", 1, 0.7)]
    )
    drawn = [
        one.get_offsets()[0].tolist() for one in figure.axes[0].collections if len(one.get_paths()[0]) > 2
    ]
    np.testing.assert_allclose(drawn, [(0, 40), (5, 60), (100, 70)])
    assert set(texts(figure)) == {"edge, 300 ms", "redact, 500 ms", "cloud, 500 ms"}
    assert title(figure) == (
        "Redacted, 5 % of data with a form leaves and 60 % is right;\nunredacted, 100 % and 70 %"
    )
    assert "e-mail, phone, card, IBAN, IP" in figure.axes[0].get_xlabel()
    assert figure.get_supxlabel() == ""


def test_a_policy_without_a_value_is_left_out_and_one_of_two_links_says_which():
    wifi = redacted("edge", 0, 0.5)
    wifi["recipe"] = wifi["recipe"].replace("lte", "wifi")
    figure = plots.policies([redacted("edge", 0, 0.4, math.nan), wifi, redacted("cloud", None, 0.7)])
    assert set(texts(figure)) == {"edge, lte", "edge, wifi, 500 ms"}
    assert "not measured: 1" in figure.get_supxlabel()
    assert plots.policies([redacted("edge", 0, 0), redacted("cloud", 1, 0.5)]).axes[0].get_ylim()[0] == 0
    assert title(figure) == "What leaves the device, and what that buys"
    assert texts(plots.policies([redacted("local", 0.1, 0.5)])) == ["local, 500 ms"]
    for empty in ([], [redacted("cloud", None, 0.7)], [redacted("cloud", 1, 0.7, status="failed")]):
        with pytest.raises(NothingToDraw, match=r'@ redact with only="privacy"'):
            plots.policies(empty)


def test_policies_of_fast_mode_are_stamped():
    assert "FAST" in plots.policies([redacted("redact", 0, 0.5, fast=True)]).get_suptitle()
    assert plots.policies([redacted("redact", 0, 0.5)]).get_suptitle() == ""


# Ways

CLOUD_LTE = f"{TECHNIQUES} @ cloud:cloud=(none),link=lte"
CASCADE = f"{TECHNIQUES} @ cascade:cloud=(none @ openvino),link=lte"


def test_each_way_to_answer_is_named_by_what_it_does():
    rows = [
        answered(TECHNIQUES, 0.31, 200, 300),
        answered(CLOUD_LTE, 0.42, 400, 500, cloud_share=1.0),
        answered(CASCADE, 0.37, 210, 600, cloud_share=0.28),
        answered(f"{CASCADE},share=0.6,score=mean", 0.4, 380, 620),
        answered(f"{TECHNIQUES} @ speculative:cloud=(none),link=lte,draft=8,pipelined=true", 0.42, 700, 900),
        answered("none @ split:link=lte,cut=5", 0.42, 900),
    ]
    figure = plots.ways(rows)
    assert set(texts(figure)) == {
        "edge only", "cloud only", "cascade, 28 % in the cloud", "cascade, 60 % in the cloud",
        "drafts of 8, pipelined", "split behind layer 5",
    }  # fmt: skip
    assert sorted(places(figure)) == [(200, 31), (210, 37), (380, 40), (400, 42), (700, 42), (900, 42)]
    tails = [line.get_xydata().tolist() for line in figure.axes[0].lines]
    assert [[200, 31], [300, 31]] in tails and len(tails) == 5  # the split has no 95 % time
    assert title(figure) == "Most often right: cloud only, 42.0 % in 400 ms, the quickest of 3"
    assert title(plots.ways(rows[:2])) == "Most often right: cloud only, 42.0 % in 400 ms"
    assert figure.axes[0].get_xscale() == "linear" and figure.axes[0].get_ylim()[0] > 20
    assert plots.ways([answered(TECHNIQUES, 0, 200), rows[1]]).axes[0].get_ylim()[0] == 0


def test_equal_names_get_what_tells_them_apart():
    rows = [
        answered(TECHNIQUES, 0.31, 200), answered("none", 0.42, 240),
        answered(CLOUD_LTE, 0.42, 400), answered(CLOUD_LTE.replace("lte", "3g"), 0.42, 4000),
    ]  # fmt: skip
    figure = plots.ways(rows)
    assert set(texts(figure)) == {
        "edge only, layers without 13/14/15", "edge only, baseline", "cloud only, lte", "cloud only, 3g"
    }  # fmt: skip
    assert figure.axes[0].get_xscale() == "log"


def test_of_many_rows_a_dozen_are_named_and_each_kind_among_them():
    many = [answered(f"{CASCADE},share={one / 50}", 0.3 + one / 500, 200 + one) for one in range(30)]
    rows = [*many, answered(CLOUD_LTE, 0.1, 4000), answered("none @ split:link=lte,cut=5", 0.1, 5000)]
    named = texts(plots.ways(rows))
    assert len(named) == 12 and {"cloud only", "split behind layer 5"} <= set(named)


def test_the_newest_of_equal_rows_counts_and_rows_without_a_time_are_said():
    rows = [
        answered(TECHNIQUES, 0.3, 200), answered(TECHNIQUES, 0.35, 180, started_at="2026-11-24T10:00:00"),
        answered(CLOUD_LTE, 0.4, None),
    ]  # fmt: skip
    figure = plots.ways(rows)
    assert places(figure) == [(180, 35)] and texts(figure) == ["edge only"]
    assert "not measured: 1" in figure.get_supxlabel()
    assert title(figure) == "Right answers against the time of a request"
    # Wilson's interval of 112 of 320 is 29.98 to 40.38 %
    assert "known to ± 5 points" in figure.get_supxlabel()
    assert "known to" not in plots.ways([answered(TECHNIQUES, 0.3, 200, requests_items=None)]).get_supxlabel()
    for empty in ([], rows[2:]):
        with pytest.raises(NothingToDraw, match=r'only="requests"'):
            plots.ways(empty)


# Outages


def test_an_outage_is_shaded_and_each_request_coloured_by_who_answered():
    figure = plots.outage([1, 2, 3, 4], ["cloud", "edge", "nobody", "cloud"], [700, 900, 1000, 720], 1.5, 3.5)
    axes = figure.axes[0]
    band = axes.patches[0]
    assert (band.get_x(), band.get_x() + band.get_width()) == (1.5, 3.5)
    points = {to_hex(line.get_color()): line.get_xydata().tolist() for line in axes.lines}
    assert points == {CLOUD: [[1, 700], [4, 720]], EDGE: [[2, 900]], NOBODY: [[3, 1000]]}
    assert set(texts(figure)) == {"outage", "cloud: 2", "edge: 1", "nobody: 1"}
    assert title(figure) == "During the outage 1 of 2 requests were answered"


def test_a_request_without_a_time_is_counted_and_not_drawn():
    figure = plots.outage([1, 2], ["cloud", "nobody"], [700, math.nan], 1.5, 3.5)
    assert len(figure.axes[0].lines) == 1 and "without a time: 1" in figure.get_supxlabel()
    assert title(figure) == "During the outage 0 of 1 requests were answered"
    assert title(plots.outage([1], ["edge"], [200], 5, 6)) == "No request was asked during the outage"
    for seconds, ms in ([], []), ([1], [math.nan]):
        with pytest.raises(NothingToDraw, match="no request has a time"):
            plots.outage(seconds, ["edge"] * len(seconds), ms, 0, 1)
