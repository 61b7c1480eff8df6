"""Checkpoints: where a run of training has got to, so that one that was stopped can go on."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from edgelab import assets

EVERY_S = 120.0  # a second of writing for a model of 135 M parameters and its optimizer, 1.6 GB


Point = dict[str, float]  # of the curve of a run


@dataclass(frozen=True)
class Checkpoint:
    """Where a run is kept until it has ended. folder: of this run alone. every_s: seconds from one to the next.

    Beside the folder lies the curve of the run as it grows, a line for each step, for whoever wants to watch.
    """

    folder: Path
    every_s: float = EVERY_S

    def save(self, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
        """Keep tensors by name and what JSON can say; an earlier checkpoint is replaced whole."""
        with assets.staged(self.folder) as draft:
            draft.mkdir()
            whole = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
            try:
                save_file(whole, draft / "state.safetensors")
            except SafetensorError as error:
                raise assets.unwritable(self.folder.parent, error) from None
            (draft / "state.json").write_text(json.dumps(about))

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What was kept last; None where there is nothing, or nothing that can be read."""
        try:
            about = json.loads((self.folder / "state.json").read_text())
            with safe_open(self.folder / "state.safetensors", "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, about  # noqa: SIM118
        except (OSError, ValueError, SafetensorError):
            return None

    @property
    def _watched(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.jsonl")

    def begin(self, curve: list[Point]) -> None:
        """A run begins, or goes on behind these points."""
        with assets.staged(self._watched) as draft:
            draft.write_text("".join(f"{json.dumps(point)}\n" for point in curve))

    def note(self, point: Point) -> None:
        """Add a point to the curve; a run does not end because nobody can watch it."""
        with suppress(OSError), self._watched.open("a") as file:
            file.write(f"{json.dumps(point)}\n")

    def points(self) -> list[Point]:
        """The curve so far, of a run in this process or in another one; empty where there is none."""
        with suppress(OSError):
            lines = self._watched.read_text().splitlines(keepends=True)
            return [json.loads(line) for line in lines if line.endswith("\n")]  # the last may be half a line
        return []

    def remove(self) -> None:
        """The run has ended."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with suppress(OSError):
            self._watched.unlink()


@dataclass
class Run:
    """Where a run has got to: all that a checkpoint holds."""

    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    curve: list[Point] = field(default_factory=list)
    looks: list[float] = field(default_factory=list)
    best: list[Tensor] = field(default_factory=list)  # weights at the lowest look, where there is patience
    ended: bool = False

    def save(self, checkpoint: Checkpoint) -> None:
        tensors = {"random": torch.get_rng_state()}
        for place, parameter in enumerate(self.parameters):
            tensors[f"{place}.weight"] = parameter
            tensors |= {f"{place}.{name}": value for name, value in self.optimizer.state[parameter].items()}
        tensors |= {f"{place}.best": value for place, value in enumerate(self.best)}
        checkpoint.save(tensors, {"curve": self.curve, "looks": self.looks, "ended": self.ended})

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
        torch.set_rng_state(tensors.pop("random"))
        state: list[dict[str, Tensor]] = [{} for _ in self.parameters]
        for name, tensor in tensors.items():
            place, _, what = name.partition(".")
            state[int(place)][what] = tensor
        self.best = [values.pop("best") for values in state if "best" in values]
        for parameter, values in zip(self.parameters, state, strict=True):
            parameter.copy_(values.pop("weight"))
            self.optimizer.state[parameter] = values
        self.curve, self.looks, self.ended = about["curve"], about["looks"], about["ended"]

    def note(self, found: Point, patience: int) -> None:
        """Add what a look has found to the last point; where patience is at its end, so is the run."""
        self.curve[-1] |= found
        self.looks.append(next(iter(found.values())))
        lowest = self.looks.index(min(self.looks))
        if patience and lowest == len(self.looks) - 1:
            self.best = [parameter.detach().clone() for parameter in self.parameters]
        self.ended = bool(patience) and len(self.looks) - 1 - lowest >= patience

    @torch.no_grad()
    def take_best(self) -> None:
        if self.best:
            for parameter, value in zip(self.parameters, self.best, strict=True):
                parameter.copy_(value)
