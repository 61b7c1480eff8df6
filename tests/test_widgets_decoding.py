"""The decoding calculator: bytes of a token by hand, and a table that follows the controls."""

import pytest

from edgelab.devices import Device, models
from edgelab.widgets.decoding import decode_calculator, decode_limits, limit_sentence, token_gb

LLAMA = models()["Llama-2-7B"]


def test_bytes_of_a_token_worked_by_hand():
    linear, head = 32 * (4 * 4096**2 + 3 * 4096 * 11008), 32000 * 4096
    assert token_gb(LLAMA, 16) == pytest.approx((linear + head) * 2 / 1e9)
    assert token_gb(LLAMA, 4) == pytest.approx((linear + head) * (4 + 20 / 64) / 8e9)


def test_limits_are_bandwidth_over_bytes_and_unknown_bandwidths_are_left_out():
    devices = [Device("large", "x", 64, 100.0), Device("small", "x", 1, 10.0), Device("unknown", "x", 64)]
    limits = decode_limits(LLAMA, 4, devices)
    assert list(limits.index) == ["large", "small"] and list(limits["fits"]) == ["yes", "no"]
    assert limits.loc["large", "tokens/s at most"] == pytest.approx(100 / token_gb(LLAMA, 4))
    assert "1 of 2 devices" in limit_sentence(LLAMA, 4, limits)


def test_the_table_follows_the_controls():
    model, bits, answer = decode_calculator(20.0).children
    model.value, bits.value = "Llama-2-7B", 16
    before = answer.value
    bits.value = 4
    assert f"{token_gb(LLAMA, 4):.2f} GB" in answer.value != before
    assert "This machine" in answer.value
