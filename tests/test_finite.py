"""NaN and infinity: a row of status error that names where they begin, and JSON that every reader takes."""

import json
import math

import pytest
import torch

from edgelab import lab, ledger
from edgelab.cli import _print
from edgelab.ledger import Row, ValueNotFinite, strict_json
from edgelab.measure.perplexity import Window, logit_slices, slices
from edgelab.model.finite import NotFiniteError, check_tensors, first_module
from edgelab.model.logits import check_logits

IDS = torch.arange(2, 52)


@pytest.fixture
def measured(tmp_path, new_model, byte_tokenizer, story, monkeypatch):
    """`measured(change, *recipes, layout, only)`: rows of a tiny model whose weights were changed in place."""
    monkeypatch.setenv("EDGELAB_FAST", "1")
    text = tmp_path / "story.txt"
    text.write_text(story.text, encoding="utf-8")

    def measure(change, *recipes, layout="llama", only="quality"):
        model = new_model(layout)
        with torch.no_grad():
            change(model)
        model.save_pretrained(tmp_path / "model")
        byte_tokenizer.save_pretrained(tmp_path / "model")
        place = {"model": str(tmp_path / "model"), "corpus": str(text), "windows": 1, "threads": 1}
        return list(lab.stream(recipes, only=only, **place))

    return measure


def nan(model):
    model.model.layers[1].mlp.up_proj.weight[3, 5] = math.nan


def too_large_for_float16(model):
    model.model.layers[0].self_attn.o_proj.weight[3, 5] = 2e6


def overflows(model):
    model.model.layers[1].mlp.gate_proj.weight.mul_(1e20)
    model.model.layers[1].mlp.up_proj.weight.mul_(1e20)  # their product is beyond float32


def overflows_later(model):
    model.transformer.wpe.weight[20] = 3e38  # a position that the check at loading does not reach


def test_a_weight_that_is_nan_is_named(measured):
    (row,) = measured(nan, "none")
    assert (row.status, row.ppl) == ("error", None)
    assert row.error.startswith("model.layers.1.mlp.up_proj.weight of model holds NaN; give finite weights")


def test_a_weight_beyond_float16_is_named(measured):
    float32, float16 = measured(too_large_for_float16, "none", "quantize.fp16")
    assert float32.status == "ok" and math.isfinite(float32.ppl)
    assert (float16.status, float16.ppl) == ("error", None)
    assert float16.error.startswith(
        "model.layers.0.self_attn.o_proj.weight after quantize.fp16 holds infinity"
    )


def test_activations_that_overflow_are_named(measured):
    (row,) = measured(overflows, "none")
    assert (row.status, row.ppl) == ("error", None)
    assert row.error.startswith(
        "The output of model.layers.1.mlp.down_proj in LlamaForCausalLM is NaN or infinite"
    )


def test_overflow_that_a_few_tokens_do_not_show(new_model):
    model = new_model("gpt2")
    with torch.no_grad():
        overflows_later(model)
    check_logits(model)
    with pytest.raises(NotFiniteError, match=r"The output of transformer.h.0.ln_1 in GPT2LMHeadModel"):
        list(slices(model, [Window(IDS, 1, 49)]))


def test_a_model_that_answers_with_nan_is_not_timed(measured):
    (row,) = measured(overflows_later, "none", layout="gpt2", only="speed")
    assert (row.status, row.decode_tok_s) == ("error", None)
    assert "The model answers the prompt with NaN or infinity; measure its quality" in row.error


def test_logits_of_an_engine_are_looked_at(new_model):
    logits = torch.zeros(49, 300)
    assert len(list(logit_slices(lambda ids: logits, [Window(IDS, 1, 49)]))) == 1
    for value in (math.nan, math.inf):
        logits[30, 7] = value
        with pytest.raises(NotFiniteError, match="gives NaN or infinity in place of logits, in window 1"):
            list(logit_slices(lambda ids: logits, [Window(IDS, 1, 49)]))


def test_a_token_that_is_ruled_out_is_no_fault():
    logits = torch.zeros(49, 300)
    logits[:, 299] = -math.inf
    (piece,) = logit_slices(lambda ids: logits, [Window(IDS, 1, 49)])
    assert piece.log_probs[0, 5].item() == pytest.approx(-math.log(299))


def test_integers_and_masks_are_not_looked_at():
    check_tensors({"packed": torch.tensor([255], dtype=torch.uint8), "scale": torch.ones(2)}, "of it")
    with pytest.raises(NotFiniteError, match="scale of it holds infinity"):
        check_tensors({"good": torch.ones(2), "scale": torch.tensor([1.0, -math.inf])}, "of it")


def test_the_first_module_is_the_innermost():
    inner = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Linear(1, 1))
    torch.nn.init.constant_(inner[1].weight, 1e30)
    model = torch.nn.Sequential(torch.nn.ReLU(), inner)
    assert first_module(model, lambda: model(torch.tensor([1.0]))) is None
    assert first_module(model, lambda: model(torch.tensor([1e30]))) == "1.1"
    assert not inner[1]._forward_hooks


def test_a_row_takes_no_value_that_is_not_finite():
    row = Row("none")
    row.fill({"ppl": 3.0, "notes": None, "window_nll": [1.0, 2.0], "fast": True})
    for bad in (math.inf, math.nan, -math.inf):
        with pytest.raises(ValueNotFinite, match=f"kld_mean is {bad}: under this recipe"):
            row.fill({"kld_mean": bad})
    with pytest.raises(ValueNotFinite, match="window_nll is not finite"):
        row.fill({"window_nll": [1.0, math.nan]})
    assert (row.ppl, row.kld_mean, row.window_nll) == (3.0, None, [1.0, 2.0])


def strictly(text: str):
    """As a reader of JSON that knows its standard only."""

    def refuse(name: str):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


HOLES = {
    "ppl": math.inf,
    "window_nll": [1.0, math.nan],
    "extra": {"a": -math.inf, "b": (1, 2.5)},
    "fast": True,
}
FILLED = {"ppl": None, "window_nll": [1.0, None], "extra": {"a": None, "b": [1, 2.5]}, "fast": True}


def test_json_has_no_nan_and_no_infinity(tmp_path, capsys):
    assert strictly(strict_json(HOLES)) == FILLED
    _print([HOLES], True)
    assert strictly(capsys.readouterr().out) == FILLED
    old = Row(
        "none", ppl=math.inf, window_nll=[math.inf], extra={"a": math.nan}
    )  # as earlier versions kept them
    file = ledger.export([ledger.add(old)], tmp_path / "rows.jsonl")
    written = strictly(file.read_text())
    assert (written["ppl"], written["window_nll"], written["extra"]) == (None, [None], {"a": None})
