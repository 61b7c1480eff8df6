"""The `evaluate` modules agree with torch, and combine with each other and with modules of that library."""

import datasets
import evaluate
import pytest
import torch
from torch.nn import functional

from edgelab.measure.metrics import KLDivergence, Perplexity, Top1Agreement

LOGITS = torch.randn(12, 7, generator=torch.Generator().manual_seed(0))
REFERENCE = torch.randn(12, 7, generator=torch.Generator().manual_seed(1))
TOKENS = torch.arange(12) % 7


class MeanSquaredError(evaluate.Metric):
    """A module as others write them, with the inputs of the library's own `mse` in its multi-list form."""

    def _info(self):
        row = datasets.Sequence(datasets.Value("float32"))
        features = datasets.Features({"predictions": row, "references": row})
        return evaluate.MetricInfo(description="mse", citation="", features=features)

    def _compute(self, predictions, references):
        return {"mse": float(((torch.tensor(predictions) - torch.tensor(references)) ** 2).mean())}


def test_perplexity_is_exp_of_torchs_cross_entropy():
    found = Perplexity().compute(predictions=LOGITS.tolist(), references=TOKENS.tolist())
    assert found["perplexity"] == pytest.approx(
        functional.cross_entropy(LOGITS, TOKENS).exp().item(), rel=1e-6
    )


def test_batches_add_up_to_the_whole():
    metric = Perplexity()
    for part in range(0, 12, 4):
        metric.add_batch(
            predictions=LOGITS[part : part + 4].tolist(), references=TOKENS[part : part + 4].tolist()
        )
    whole = Perplexity().compute(predictions=LOGITS.tolist(), references=TOKENS.tolist())
    assert metric.compute()["perplexity"] == pytest.approx(whole["perplexity"], rel=1e-9)


def test_they_combine_with_each_other_and_with_another_module():
    combined = evaluate.combine([KLDivergence(), Top1Agreement(), MeanSquaredError()])
    found = combined.compute(predictions=LOGITS.tolist(), references=REFERENCE.tolist())
    expected = functional.kl_div(
        LOGITS.log_softmax(-1), REFERENCE.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    assert found["kl_divergence"] == pytest.approx(expected.item(), rel=1e-5)
    assert found["top1_agreement"] == pytest.approx(
        (LOGITS.argmax(-1) == REFERENCE.argmax(-1)).double().mean().item()
    )
    assert found["mse"] == pytest.approx(((LOGITS - REFERENCE) ** 2).mean().item(), rel=1e-5)


def test_agreement_takes_tokens_as_well():
    assert Top1Agreement().compute(predictions=[1, 2, 3, 4], references=[1, 2, 0, 0])["top1_agreement"] == 0.5
