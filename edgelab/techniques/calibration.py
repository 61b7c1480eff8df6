"""Calibration text: which tokens a technique sees before it decides how to round or what to remove."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from edgelab import assets, corpora
from edgelab.recipes import Context, RecipeError

FAST_SAMPLES = 8


class CalibrationError(RecipeError):
    """Calibration text that is too short, or samples that do not fit the model."""


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """Settings of every technique that looks at text.

    samples: windows of text. length: tokens of a window. corpus: a corpus with a calibration split; another split is
    asked for by name, as in wiki.evaluation. The seed of the recipe chooses the windows; seed 0 takes the first.
    """

    kept: ClassVar[bool] = True  # as a stage: calibrating costs

    samples: int = 64
    length: int = 512
    corpus: str = "web"

    def __post_init__(self) -> None:
        if self.samples < 1 or self.length < 2:
            raise CalibrationError(
                f"Calibration needs at least 1 sample of 2 tokens, not samples={self.samples},length={self.length}."
            )
        corpora.check(*self._text())

    def _text(self) -> tuple[str, str]:
        """The corpus and its split."""
        corpus, _, split = self.corpus.partition(".")
        return corpus, split or "calibration"

    def draw(self, context: Context, longest: int) -> Tensor:
        """Token windows (samples, length) int64, and a record of how many tokens that is. FAST takes fewer samples.

        longest: tokens that the model can see. Raises CalibrationError where text or model are too short.
        """
        if self.length > longest:
            raise CalibrationError(
                f"length={self.length} is longer than the {longest} tokens the model can see."
            )
        corpus, split = self._text()
        ids = corpora.tokenize(corpus, context.tokenizer, split).ids
        available = len(ids) // self.length
        samples = min(self.samples, FAST_SAMPLES) if assets.fast() else self.samples
        if samples > available:
            raise CalibrationError(
                f"{self.corpus} has {len(ids)} tokens for calibration, enough for {available} samples of "
                f"{self.length}, not {samples}."
            )
        windows = ids[: available * self.length].view(available, self.length)
        if context.seed:
            order = torch.randperm(available, generator=torch.Generator().manual_seed(context.seed))
            windows = windows[order]
        context.record.calibration_tokens = samples * self.length
        return windows[:samples]
