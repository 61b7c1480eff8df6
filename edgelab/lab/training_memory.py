"""What training takes in memory: counted from shapes, and measured as the peak of a process that does nothing else."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from edgelab.errors import EdgeLabError
from edgelab.measure import isolation
from edgelab.measure.memory import give_back_at_once, peak_rss_mb
from edgelab.model.blocks import bfloat16_is_fast
from edgelab.model.losses import cross_entropy
from edgelab.model.shapes import skeleton
from edgelab.recipes import Context, Recipe, parse
from edgelab.reference import resolve
from edgelab.storage import variants
from edgelab.storage.uniform import QuantizedTensor
from edgelab.techniques.distillation import Distill
from edgelab.techniques.footprint import Footprint, footprint
from edgelab.techniques.lora import LoRA
from edgelab.techniques.quantization.rtn import linear_layers
from edgelab.techniques.recovery import Recover
from edgelab.training import Trained, recomputing, train

STEPS = 3  # the moments of the optimizer come with the first


class Trainee:
    """A model in a process of its own, with the last technique of a recipe to be trained on it."""

    def __init__(self, folder: str, recipe: str) -> None:
        skeleton(variants.load_config(Path(folder)))
        import peft  # noqa: F401  so that what imports take counts as nothing

        give_back_at_once()
        self.nothing_mb = peak_rss_mb()
        self.technique = parse(recipe).techniques[-1]
        adapter = _adapter(self.technique)
        model = variants.load(Path(folder))
        self.model = adapter.started(model, Context()) if adapter else model.requires_grad_(True)

    def train(self) -> float:
        """MB at the peak of some steps on random tokens, beyond what the process needs without a model."""
        rows = torch.randint(self.model.config.vocab_size, (self.technique.batch, self.technique.length))
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        again = recomputing(self.model) if self.technique.activation_checkpointing else nullcontext()
        with again:
            train(
                self.model,
                itertools.repeat(rows),
                cross_entropy,
                trained,
                steps=STEPS,
                half=bfloat16_is_fast(),
            )
        return peak_rss_mb() - self.nothing_mb


def _adapter(technique: Trained) -> LoRA | None:
    """The adapter that a technique trains, None for all weights. Raises EdgeLabError for what is not counted."""
    if isinstance(technique, Recover) and technique.adapter == "lora":
        technique = technique.beside()
    plain = isinstance(technique, LoRA) and not (technique.dropout or technique.dora)
    if getattr(technique, "loss", "") != "ce" or not (plain or isinstance(technique, Recover | Distill)):
        raise EdgeLabError(
            f"{technique.method} with these settings holds more than a step of training does, such as a teacher; lora "
            "and qlora without dropout and dora are counted, and recover and distill with loss=ce."
        )
    # Where it begins takes no memory, and a residual has to be found from the reference.
    return replace(technique, start="zero") if isinstance(technique, LoRA) else None


def training_memory(
    recipe: str | Recipe, model: str | None = None, threads: int = 2
) -> tuple[Footprint, float]:
    """The memory that the last technique of a recipe trains in: counted from shapes, and the measured peak in MB.

    The technique trains all weights or an adapter; its loss is the next token, without a teacher. What stands before
    it is made where it is not kept. Raises EdgeLabError for a recipe that does not end in such training, and for one
    behind which layers are stored in several ways or have shapes that the configuration does not give.
    """
    asked = parse(recipe) if isinstance(recipe, str) else recipe
    technique = asked.techniques[-1] if asked.techniques else None
    if not isinstance(technique, Trained):
        raise EdgeLabError(f"{asked} does not end in training; lora, qlora and recover:loss=ce do.")
    adapter = _adapter(technique)
    folder = variants.build(
        asked.prefix(len(asked.techniques) - 1),
        resolve(model) if model else resolve(),
        0,
        lambda done, total: None,
    )
    packing = _packing(folder)
    if packing and adapter is None:
        raise EdgeLabError(
            f"{technique.method} trains float weights; put it before quantizing, or train qlora."
        )
    counted = footprint(
        variants.load_config(folder),
        adapter,
        **packing,
        packed=False,
        dtype=getattr(torch, variants.read_description(folder).dtype),
        half=bfloat16_is_fast(),
        batch=technique.batch,
        length=technique.length,
        activation_checkpointing=technique.activation_checkpointing,
    )
    with isolation.Isolated(
        "edgelab.lab.training_memory:Trainee", threads, folder=str(folder), recipe=str(asked)
    ) as trainee:
        return counted, trainee.call("train")


def _packing(folder: Path) -> dict[str, Any]:
    """Bits and group size of a variant whose linear layers are all stored alike; nothing for a float one."""
    about = variants.read_description(folder)
    ways = {(how.get("format"), how.get("bits"), how.get("group_size")) for how in about.matrices.values()}
    linear = linear_layers(skeleton(variants.load_config(folder)))
    alike = (
        about.matrices.keys() == linear.keys()
        and len(ways) == 1
        and next(iter(ways))[0] == QuantizedTensor.format
    )
    if about.shapes or (ways and not alike):
        raise EdgeLabError(
            "Memory of training is counted for layers of even shapes that are all in float or all on one grid, such as "
            "those of quantize.rtn."
        )
    return {} if not ways else dict(zip(("bits", "group_size"), next(iter(ways))[1:], strict=True))
