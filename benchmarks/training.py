"""The training loop beside a bare one: tokens per second over the same model, batches and precision, in turns.

Bare is forward with labels, backward and PyTorch's fused AdamW: no clipping, no schedule, no curve, all logits at once.
"""

from __future__ import annotations

import copy
import itertools
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from edgelab import reference
from edgelab.model.blocks import bfloat16_is_fast
from edgelab.model.losses import Divergence, cross_entropy, live
from edgelab.recipes import Context
from edgelab.techniques.quantization.floats import BFloat16
from edgelab.techniques.quantization.qat import QuantizationAwareTraining
from edgelab.training import Trained, recomputing, train

ROUNDS, STEPS = 4, 4  # the first step of each turn, which allocates, does not count
BATCH, LENGTH = 4, 256


def bare(model: PreTrainedModel, data: Iterator[Tensor], half: bool) -> list[float]:
    """Seconds of each step."""
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=True)
    seconds = []
    for ids in itertools.islice(data, STEPS):
        started = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
    return seconds


def ours(model: PreTrainedModel, loss: Callable, data: Iterator[Tensor], half: bool) -> list[float]:
    """Seconds of each step of the package's loop."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    curve = train(model, data, loss, parameters, steps=STEPS, learning_rate=1e-6, half=half)
    ends = [0.0, *(point["seconds"] for point in curve)]
    return [after - before for before, after in itertools.pairwise(ends)]


def rows() -> Iterator[tuple[str, str, str]]:
    torch.set_num_threads(2)
    half, loaded = bfloat16_is_fast(), reference.load()
    text = Trained(length=LENGTH)._rows(loaded.tokenizer)[0]
    data = itertools.cycle(text[: BATCH * 64].split(BATCH))
    model = loaded.model.requires_grad_(True)
    teacher = BFloat16().apply(model, Context()) if half else copy.deepcopy(model)
    rounded = QuantizationAwareTraining(bits="3").prepare(model)

    def recomputed(loss: Callable) -> list[float]:
        with recomputing(model):
            return ours(model, loss, data, half)

    contestants: dict[str, Callable[[], list[float]]] = {
        "bare loop": lambda: bare(model, data, half),
        "cross-entropy": lambda: ours(model, cross_entropy, data, half),
        "divergence (recover)": lambda: ours(model, Divergence(live(teacher)), data, half),
        "divergence and rounding (qat)": lambda: ours(rounded, Divergence(live(teacher)), data, half),
        "cross-entropy, activations computed again": lambda: recomputed(cross_entropy),
    }
    turns: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(ROUNDS):
        for name, run in contestants.items():
            turns[name].append(statistics.median(run()[1:]))
    precision = "bfloat16" if half else "float32"
    for name, seconds in turns.items():
        share = statistics.median(one / other for one, other in zip(turns["bare loop"], seconds, strict=True))
        rate = BATCH * LENGTH / statistics.median(seconds)
        bound = "at least 0.85 of it" if name == "cross-entropy" else ""
        yield (
            f"training, {BATCH} x {LENGTH} tokens, {precision}: {name}",
            f"{rate:.0f} tok/s, {share:.2f} of bare",
            bound,
        )


if __name__ == "__main__":
    for what, value, bound in rows():
        print(what, "|", value, "|", bound)
