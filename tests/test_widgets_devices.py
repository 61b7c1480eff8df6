"""The device picker without a browser: its controls, its verdict and its picture."""

import pytest

from edgelab.devices import PRECISIONS, Device, Engine, estimate, models
from edgelab.widgets.devices import device_picker, verdict

NAMES = ["device", "model", "precision", "context", "power", "answer", "picture", "own"]


def parts(picker):
    return dict(zip(NAMES, picker.children, strict=True))


def test_every_control_changes_the_answer():
    widgets = parts(device_picker())
    assert widgets["picture"].value.startswith('<img src="data:image/png;base64,')
    for name, value in [
        ("device", "Jetson Orin Nano"),
        ("precision", "Q4_0"),
        ("model", "Gemma-2B"),
        ("context", 8192),
        ("power", 7.0),
    ]:
        before = widgets["answer"].value
        widgets[name].value = value
        assert widgets["answer"].value != before, name


def test_power_follows_the_device_and_pays_for_a_battery_once_it_is_known():
    widgets = parts(device_picker())
    widgets["precision"].value, widgets["model"].value = "Q4_0", "Gemma-2B"
    widgets["device"].value = "Jetson Orin Nano"
    assert widgets["power"].value == 15 and "15 W" in widgets["answer"].value
    widgets["device"].value = "Phone, Snapdragon 778G"
    assert widgets["power"].value == 0 and "J per token" not in widgets["answer"].value
    widgets["power"].value = 4
    assert "estimated: 4 W" in widgets["answer"].value and "of the battery" in widgets["answer"].value


@pytest.mark.parametrize(
    "memory, bandwidth, words",
    [(1, 10, "<b>No</b>"), (2.4, 10, "<b>Tight</b>"), (16, 10, "<b>Fits</b>"), (16, None, "not known")],
)
def test_the_verdict(memory, bandwidth, words):
    device = Device("a <box>", "test", memory, bandwidth, runs_on="CPU")
    row = estimate(device, models()["Phi-2"], PRECISIONS["Q4_0"], engine=Engine())
    said = verdict(device, row, 2048)
    assert words in said and "<box>" not in said


def test_this_machine_takes_its_measured_bandwidth_and_calibration():
    slow = Engine(bandwidth_share=0.25, basis="calibrated on 97 tokens/s of Q4_1")
    widgets = parts(device_picker(read_gb_s=26.0, engine=slow, shapes={"m": models()["SmolLM2-135M"]}))
    assert widgets["device"].value == "This machine" and "calibrated on 97" in widgets["answer"].value


def test_a_device_of_ones_own_is_kept_and_chosen(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGELAB_HOME", str(tmp_path))
    widgets = parts(device_picker())
    name, memory, bandwidth, compute, part, keep, told = widgets["own"].children[0].children
    keep.click()
    assert "column name: it is empty" in told.value and not (tmp_path / "devices.csv").exists()
    name.value, memory.value, bandwidth.value, compute.value, part.value = "Mine", 8, 51.2, 100, "CPU"
    keep.click()
    assert widgets["device"].value == "Mine" and "Mine" in widgets["answer"].value
    assert "Mine" in parts(device_picker())["device"].options
