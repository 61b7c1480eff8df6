"""The budget slider of mixed precision without a browser: what it says is what the table allocates."""

import re

import numpy as np
import pytest

from edgelab.techniques.quantization.mixed import Mixed, SensitivityTable
from edgelab.widgets.mixed import allocation_slider

PNG = '<img src="data:image/png;base64,'


@pytest.fixture(params=["rows", "groups"])
def table(request):
    random = np.random.default_rng(0)
    names = [f"model.layers.{block}.mlp.{kind}" for block in range(4) for kind in ("up_proj", "down_proj")]
    shapes = [(192, 64), (64, 192)] * 4
    formats = Mixed(group_size=32, wide=request.param).formats
    cost = random.lognormal(-4, 1, (8, 1)) * 4.0 ** -np.array([bits for bits, _ in formats])
    return SensitivityTable(names, shapes, cost, 2048, formats)


def predicted(answer):
    return float(re.search(r'data-predicted="([^"]+)"', answer.value)[1])


def test_the_budget_changes_sentence_and_picture(table):
    budget, answer, picture = allocation_slider(table).children
    assert (budget.min, budget.max, budget.value) == (2, 8, 4)
    assert picture.value.startswith(PNG)
    seen = {}
    for bits in (2, 3.5, 4, 6.2, 8):
        before = picture.value, answer.value
        budget.value = bits
        seen[bits] = predicted(answer)
        assert bits == 4 or (picture.value, answer.value) != before
        assert seen[bits] == pytest.approx(table.predicted(table.allocate(bits, 32)), rel=1e-5)
        assert f"quantize.mixed:bits={bits:g},group_size=32" in answer.value
        assert ("wide=groups" in answer.value) == (table.formats[-1][1] > 0)
    assert list(seen.values()) == sorted(seen.values(), reverse=True)


def test_the_sentence_says_bytes_bits_and_the_uniform_prediction(table):
    _, answer, _ = allocation_slider(table, bits=3).children
    choice = table.allocate(3, 32)
    frame = table.frame(choice)
    assert f"{frame['bytes'].sum() / 1e6:,.1f} MB" in answer.value and frame["bytes"].sum() <= table.budget(
        3, 32
    )
    assert f"{frame['bits'].min()} to {frame['bits'].max()} bits" in answer.value
    uniform = table.predicted(np.full(8, 1))
    assert f"All layers at 3 bits: {uniform:.3f} predicted" in answer.value
    assert predicted(answer) <= uniform
