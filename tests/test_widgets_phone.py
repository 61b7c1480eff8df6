"""The widget that takes lines of llama-bench, without a browser, and the picture it draws."""

import re

import pytest

from edgelab.devices import fit_bench, models, read_bench, saved_bench, what_fits
from edgelab.plots import NothingToDraw, bench_roofline, rates_that_fit
from edgelab.widgets import phone
from edgelab.widgets.phone import phone_bench

XIAOMI = saved_bench("xiaomi_14")
RADXA = saved_bench("radxa_dragon_q6a")
NAMES = [
    "text",
    "setting",
    "device",
    "room",
    "peak",
    "context",
    "kinds",
    "answer",
    "rows",
    "picture",
    "roofline",
]
SMALL = {name: models()[name] for name in ("Llama-3.2-1B", "Gemma-2B", "Llama-2-70B")}


def parts(widget):
    return dict(zip(NAMES, widget.children, strict=True))


def test_nothing_pasted_says_what_to_do():
    widgets = parts(phone_bench(shapes=SMALL))
    assert "run `llama-bench -m model.gguf` on the device" in widgets["answer"].value
    assert widgets["picture"].value == widgets["rows"].value == widgets["roofline"].value == ""
    assert widgets["setting"].options == ()


def test_a_real_output_is_answered_with_a_sentence_a_table_and_a_picture():
    widgets = parts(phone_bench(shapes=SMALL))
    widgets["device"].value = "Phone, Snapdragon 8 Gen 3"
    assert widgets["room"].value == 7.2 and widgets["peak"].value == 76.8
    widgets["text"].value = XIAOMI
    assert "of the 76.8 GB/s of its memory" in widgets["answer"].value
    assert "By kind of file" in widgets["answer"].value and "GFLOP/s" in widgets["answer"].value
    assert "Gemma-2B" in widgets["rows"].value and "needs" in widgets["rows"].value
    assert widgets["picture"].value.startswith('<img src="data:image/png;base64,')


def test_a_chosen_device_has_a_roofline_and_its_alt_text_names_the_tests():
    widgets = parts(phone_bench(XIAOMI, shapes=SMALL))
    assert widgets["roofline"].value == "" and widgets["picture"].value  # no peak is known
    widgets["device"].value = "Phone, Snapdragon 8 Gen 3"
    drawn = widgets["roofline"].value
    assert drawn.startswith('<img src="data:image/png;base64,')
    alt = re.search('alt="(.*?)"', drawn).group(1)
    assert "76.8 GB/s" in alt and "llama 1B F16, 1 token" in alt and "llama-bench" in alt
    widgets["context"].value = 8192
    assert widgets["roofline"].value == drawn  # which asks for no context
    widgets["peak"].value = 100
    assert "100 GB/s" in re.search('alt="(.*?)"', widgets["roofline"].value).group(1)
    widgets["peak"].value = 0
    assert widgets["roofline"].value == ""


def test_another_device_has_the_room_that_was_given_and_no_peak():
    widgets = parts(phone_bench(XIAOMI, room_gb=2.5, device="Phone, Snapdragon 8 Gen 3", shapes=SMALL))
    assert widgets["room"].value == 7.2 and widgets["roofline"].value
    widgets["device"].value = phone.OTHER
    assert widgets["room"].value == 2.5 and widgets["peak"].value == 0 and widgets["roofline"].value == ""


def test_a_long_wait_is_written_in_whole_seconds():
    widgets = parts(phone_bench(RADXA, room_gb=24, shapes={"m": models()["Llama-2-13B"]}))
    waits = re.findall(r", ([\d,.e+]+) s<", widgets["rows"].value)
    assert waits and all(re.fullmatch(r"[\d,]{3,}", one) for one in waits)


def test_a_model_that_was_made_for_shorter_texts_says_so():
    widgets = parts(phone_bench(XIAOMI, shapes=SMALL))
    widgets["context"].value = 8192
    assert re.findall(r"<td>([^<]*made for[^<]*)</td>", widgets["rows"].value) == [
        "Llama-2-70B (made for 4,096 tokens)"
    ]


def test_the_upper_roof_is_the_best_prefill_and_no_test_is_above_it(monkeypatch):
    asked = []
    monkeypatch.setattr(phone, "bench_roofline", lambda *about: asked.append(about) or bench_roofline(*about))
    phone_bench(XIAOMI, device="Phone, Snapdragon 8 Gen 3", shapes=SMALL)
    points, peak, roof = asked[-1]
    assert peak == 76.8 and roof == pytest.approx(points["gflop_s"].max())


def test_without_a_line_of_prefill_a_sentence_takes_the_place_of_the_roofline():
    text = "\n".join(line for line in XIAOMI.splitlines() if " pp" not in line)
    widgets = parts(phone_bench(text, device="Phone, Snapdragon 8 Gen 3", shapes=SMALL))
    assert "needs a test of prefill (pp)" in widgets["roofline"].value and "<img" in widgets["picture"].value


def test_every_control_changes_the_answer():
    widgets = parts(phone_bench(XIAOMI, shapes=SMALL))
    for name, value, changed in [
        ("room", 2.0, "rows"),
        ("peak", 76.8, "answer"),
        ("peak", 70.0, "roofline"),
        ("context", 8192, "rows"),
        ("kinds", ("Q4_0",), "rows"),
        ("text", RADXA, "answer"),
    ]:
        before = widgets[changed].value
        widgets[name].value = value
        assert widgets[changed].value != before, name
    assert "not in the catalogue" in widgets["answer"].value


def test_the_setting_is_chosen_among_those_that_were_run():
    text = "| model | size | params | backend | threads | test | t/s |\n|-|-|-|-|-|-|-|\n"
    for threads, rate in [(1, 4.05), (8, 16.71)]:
        text += f"| llama 7B Q4_0 | 3.56 GiB | 6.74 B | CPU | {threads} | tg16 | {rate} ± 0.10 |\n"
    widgets = parts(phone_bench(text, shapes=SMALL))
    assert widgets["setting"].value == "CPU, 8 threads"
    before = widgets["rows"].value
    widgets["setting"].value = "CPU, 1 thread"
    assert widgets["rows"].value != before and "CPU, 1 thread" in widgets["answer"].value


def test_a_bad_text_clears_what_was_shown_and_html_is_escaped():
    widgets = parts(phone_bench(XIAOMI, shapes=SMALL))
    widgets["text"].value = "<b>no table</b>"
    assert "No line of llama-bench" in widgets["answer"].value and "<b>no" not in widgets["answer"].value
    assert widgets["rows"].value == widgets["picture"].value == widgets["roofline"].value == ""


def test_where_nothing_fits_the_table_stays_and_a_sentence_takes_the_picture():
    widgets = parts(phone_bench(XIAOMI, room_gb=0.1, shapes=SMALL))
    assert "no model of this table fits 0.1 GB" in widgets["rows"].value and widgets["picture"].value == ""


def test_the_picture_names_models_rates_and_what_is_too_large():
    table = what_fits(fit_bench(read_bench(XIAOMI)), 7.2, SMALL)
    figure = rates_that_fit(table, 7.2)
    assert "Too large in every kind: Llama-2-70B" in figure.alt and "Gemma-2B" in figure.alt
    [axes] = figure.axes
    drawn = table.dropna(subset="decode_tok_s")
    assert len(axes.collections) == len(drawn) and axes.get_yscale() == "log"
    with pytest.raises(NothingToDraw, match=r"fits 0\.1 GB"):
        rates_that_fit(what_fits(fit_bench(read_bench(XIAOMI)), 0.1, SMALL), 0.1)


def test_the_roofline_has_a_line_for_each_model_and_both_roofs():
    fit = fit_bench(read_bench(XIAOMI))
    figure = bench_roofline(fit.points, 76.8, fit.compute_of("Q4_0").value)
    assert "llama 1B F16, 1 token" in figure.alt and "76.8 GB/s" in figure.alt and "llama-bench" in figure.alt
    reached = fit.points["gflop_s"] / (76.8 * fit.points["flop_per_byte"])
    assert (reached < 1).all()  # no test is above the bandwidth roof
    with pytest.raises(NothingToDraw):
        bench_roofline(fit.points.iloc[:0], 76.8, 100)
