"""The memory calculator without a browser: its controls, its sentence and its picture."""

import pytest

from edgelab.devices import Device, MemoryNeed, catalogue, models
from edgelab.plots import gigabytes, memory_bars
from edgelab.widgets.memory import memory_calculator, memory_needs

PNG = '<img src="data:image/png;base64,'


@pytest.fixture
def calculator():
    return memory_calculator(devices=[Device("small", "test", 8), Device("large", "test", 200)])


def parts(calculator):
    names = ["model", "use", "bits", "context", "batch", "answer", "picture"]
    return dict(zip(names, calculator.children, strict=True))


def test_every_control_changes_sentence_and_picture(calculator):
    widgets = parts(calculator)
    assert widgets["picture"].value.startswith(PNG)
    for name, value in [
        ("model", "Phi-2"),
        ("bits", 4),
        ("context", 2048),
        ("batch", 8),
        ("use", "training"),
    ]:
        before = widgets["answer"].value, widgets["picture"].value
        widgets[name].value = value
        assert widgets["answer"].value != before[0], name
        assert widgets["picture"].value != before[1], name


def test_the_sentence_says_the_total_and_what_fits(calculator):
    widgets = parts(calculator)
    widgets["bits"].value = 4
    assert "Llama-2-7B" in widgets["answer"].value and "5.86 GB" in widgets["answer"].value
    assert "fits 2 of 2 devices" in widgets["answer"].value
    widgets["bits"].value = 16
    assert "fits 1 of 2 devices" in widgets["answer"].value


def test_training_offers_only_the_precisions_that_train(calculator):
    widgets = parts(calculator)
    widgets["bits"].value = 2
    widgets["use"].value = "training"
    assert tuple(widgets["bits"].options) == (32, 16)
    assert "gradients" in widgets["answer"].value
    widgets["use"].value = "inference"
    assert 2 in widgets["bits"].options


def test_a_context_longer_than_the_model_s_is_said(calculator):
    widgets = parts(calculator)
    widgets["context"].value = 8192
    assert "made for 4,096 tokens" in widgets["answer"].value


def test_bars_show_needs_and_devices_and_leave_out_unknown_memory():
    needs = {"16-bit": MemoryNeed(14, 2), "4-bit": MemoryNeed(3.5, 2)}
    devices = [Device("board", "test", 8), Device("unknown", "test", None), Device("server", "test", 80)]
    upper, lower = memory_bars(needs, devices, "4-bit").axes
    assert [tick.get_text() for tick in upper.get_yticklabels()] == ["16-bit", "4-bit"]
    assert [tick.get_text() for tick in lower.get_yticklabels()] == ["board, 8 GB", "server, 80 GB"]
    assert [text.get_text() for text in upper.texts] == ["16.0 GB", "5.50 GB"]
    assert [text.get_text() for text in lower.texts] == ["fits, 2.50 GB left", "fits, 74.5 GB left →"]
    assert "analytic" in upper.get_title(loc="left") and "GB" in lower.get_xlabel()
    phone = Device("phone", "test", 6, usable_gb=3.6)
    lower = memory_bars({"16-bit": MemoryNeed(5.05)}, [phone]).axes[1]
    assert [bar.get_width() for bar in lower.patches] == [6, 3.6]
    assert lower.texts[0].get_text() == "1.45 GB too small"
    tight = memory_bars({"8-bit": MemoryNeed(7.9)}, devices[:1]).axes[1].texts[0].get_text()
    assert tight == "tight, 0.100 GB left"
    assert memory_bars(needs, devices[:1]).axes[1].texts[0].get_text() == "8.00 GB too small"


@pytest.mark.parametrize("use", ["inference", "training"])
@pytest.mark.parametrize("name", list(models()))
def test_no_label_of_the_picture_leaves_it(name, use):
    needs = memory_needs(models()[name], use, 4096, 1)
    figure = memory_bars(needs, catalogue(), list(needs)[-1])
    figure.draw_without_rendering()
    frame = figure.bbox
    for axes in figure.axes:
        for text in [*axes.texts, *axes.get_yticklabels()]:
            box = text.get_window_extent()
            assert frame.x0 <= box.x0 and box.x1 <= frame.x1, text.get_text()


@pytest.mark.parametrize(
    "value, text", [(0.21, "0.210 GB"), (3.373, "3.37 GB"), (13.48, "13.5 GB"), (1112.3, "1,112 GB")]
)
def test_gigabytes_have_three_digits(value, text):
    assert gigabytes(value) == text
