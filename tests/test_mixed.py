"""Mixed precision: within the bytes of uniform quantization, better than uniform in what it predicts, any layout."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from edgelab.recipes import Context, RecipeError, parse
from edgelab.storage.layers import PackedLinear
from edgelab.techniques.quantization.mixed import Mixed, SensitivityTable, stored_bytes
from edgelab.techniques.quantization.rtn import GroupSizeError, RoundToNearest, linear_layers, quantize_affine
from edgelab.techniques.sensitivity import MEASURES


@pytest.fixture
def tokens():
    return torch.randint(2, 300, (4, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def calibrated(monkeypatch, tokens):
    """Calibration text is `tokens`, whatever the settings."""

    def draw(self, context, longest):
        context.record.calibration_tokens = tokens.numel()
        return tokens

    monkeypatch.setattr(Mixed, "draw", draw)


@pytest.mark.parametrize("how", [(2, 32), (3, 64), (4, 64), (5, 0), (8, 0), (6, 96)])
def test_bytes_are_those_that_are_stored(how):
    tensor = quantize_affine(torch.randn(10, 192), *how)
    parts, _ = tensor.stored()
    assert stored_bytes(10 * 192, *how, row=192) == sum(part.nbytes for part in parts.values())


@pytest.mark.parametrize("sensitivity", ["fisher", "kl"])
def test_apply_stays_within_the_bytes_and_beats_uniform_in_what_it_predicts(
    new_model, calibrated, sensitivity
):
    model = new_model("llama")
    before = copy.deepcopy(model.state_dict())
    technique, context = Mixed(bits=3.5, group_size=32, sensitivity=sensitivity), Context()
    packed = technique.apply(model, context)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(type(m) is nn.Linear for m in linear_layers(model).values())
    table = technique.table(model, Context())
    layers = {name: packed.get_submodule(name) for name in table.names}
    assert set(layers) == set(linear_layers(model)) and all(
        isinstance(m, PackedLinear) for m in layers.values()
    )
    stored = sum(part.nbytes for layer in layers.values() for part in layer.tensor.stored()[0].values())
    assert stored <= table.budget(3.5, 32)
    assert {layer.tensor.bits for layer in layers.values()} > {3} or len(
        {x.tensor.bits for x in layers.values()}
    ) > 1
    # Uniform 3 bits take fewer bytes, and so are one of the choices.
    assert table.predicted(table.allocate(3.5, 32)) <= table.predicted(np.full(14, 1))
    assert type(packed.get_output_embeddings()) is nn.Linear
    assert context.record.numbers == {"predicted_kld": table.predicted(table.allocate(3.5, 32))}
    assert context.record.calibration_tokens == 96


def test_wide_layers_have_one_scale_per_row_or_groups(new_model, calibrated):
    model = new_model("llama")
    by_row = Mixed(bits=6, group_size=32)
    assert by_row.formats == [(2, 32), (3, 32), (4, 32), (5, 0), (6, 0), (8, 0)]
    widths = [
        (m.tensor.bits, m.tensor.scale.shape[1])
        for m in by_row.apply(model, Context()).modules()
        if isinstance(m, PackedLinear)
    ]
    assert all((bits >= 5) == (groups == 1) for bits, groups in widths) and max(widths)[0] >= 5
    assert {size for _, size in Mixed(wide="groups", group_size=32).formats} == {32}


def test_at_the_ends_of_the_range_it_is_uniform(new_model, calibrated):
    model = new_model("llama")
    ids = torch.arange(2, 40)[None]
    for bits, group_size in ((2, 64), (8, 0)):
        technique = Mixed(bits=bits, group_size=group_size)
        ours, theirs = (
            each.apply(model, Context())
            for each in (technique, RoundToNearest(bits=bits, group_size=group_size))
        )
        if bits == 2:  # at 8 bits a narrower format that costs nothing may be as good
            assert torch.equal(ours(ids).logits, theirs(ids).logits)
        assert all(m.tensor.bits <= bits for m in ours.modules() if isinstance(m, PackedLinear))


def test_the_range_is_that_of_the_layers(new_model, calibrated):
    model = new_model("llama")
    changed = Mixed(bits=2, group_size=32, range="mse").apply(model, Context())
    for name, layer in linear_layers(model).items():
        plain = quantize_affine(layer.weight.detach(), 2, 32, range="mse")
        assert torch.equal(changed.get_submodule(name).tensor.scale, plain.scale)


def test_every_layout_can_be_mixed(new_model, layout, calibrated):
    mixture = Mixed(bits=4, group_size=32).apply(new_model(layout), Context())
    assert sum(isinstance(module, PackedLinear) for module in mixture.modules()) >= 12
    assert mixture(torch.arange(2, 20)[None]).logits.isfinite().all()


def test_a_second_budget_reads_the_table(new_model, calibrated, monkeypatch, home):
    model = new_model("llama")
    first = Mixed(bits=4, group_size=32).table(model, Context())
    monkeypatch.setitem(MEASURES, "fisher", lambda *_: pytest.fail("computed again"))
    context = Context()
    again = Mixed(bits=3, group_size=32).table(model, context)
    assert (again.names, again.shapes, again.formats, again.tokens) == (
        first.names,
        first.shapes,
        first.formats,
        96,
    )
    assert np.array_equal(again.cost, first.cost)
    assert context.record.notes == ["Sensitivities were read from an earlier run."]
    assert len(list((home / "sensitivity").glob("*.json"))) == 1
    with torch.no_grad():
        model.model.norm.weight.mul_(1.01)
    with pytest.raises(pytest.fail.Exception, match="computed again"):  # another model is another table
        Mixed(bits=3, group_size=32).table(model, Context())


def test_the_frame_says_what_each_layer_got():
    names = ["model.layers.0.self_attn.q_proj", "model.layers.11.mlp.down_proj"]
    cost = np.array([[4.0, 1.0], [2.0, 0.5]])
    table = SensitivityTable(names, [(4, 8), (8, 16)], cost, 10, [(2, 8), (4, 8)])
    frame = table.frame(np.array([0, 1]))
    assert frame[["block", "kind", "bits", "group_size"]].to_numpy().tolist() == [
        [0, "q_proj", 2, 8],
        [11, "down_proj", 4, 8],
    ]
    # 32 weights at 2 bits, 4 scales of 2 bytes, 4 zero-points at 2 bits; 128 at 4 bits, 16 scales, 16 zero-points.
    assert frame["bytes"].tolist() == [8 + 8 + 1, 64 + 32 + 8]
    assert frame["cost"].tolist() == [4.0, 0.5] and frame["sensitivity"].tolist() == [1.0, 0.5]
    assert table.predicted(np.array([0, 1])) == 4.5


def test_recipes_round_trip():
    assert str(parse("quantize.mixed:bits=4.0")) == "quantize.mixed:bits=4,group_size=64"
    text = "quantize.mixed:bits=3.5,group_size=32,wide=groups,sensitivity=kl"
    assert str(parse(str(parse(text)))) == str(parse(text)) and parse(text).techniques[0].bits == 3.5
    assert parse("quantize.mixed").techniques[0].samples == 4


@pytest.mark.parametrize(
    "settings, message",
    [
        ("bits=1.5", "bits=1.5 is outside 2 to 8"),
        ("bits=nan", "bits is a number, not 'nan'"),
        ("group_size=-1", "group_size=-1 is negative"),
        ("sensitivity=hessian", "is one of fisher, kl, not 'hessian'"),
        ("samples=0", "at least 1 sample"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(RecipeError, match=message):
        parse(f"quantize.mixed:{settings}")


def test_bad_models_and_groups(new_model, calibrated):
    with pytest.raises(GroupSizeError, match="group_size=40"):
        Mixed(group_size=40).apply(new_model("llama"), Context())
    rounded = RoundToNearest().apply(new_model("llama"), Context())
    with pytest.raises(RecipeError, match="quantized already"):
        Mixed().apply(rounded, Context())
