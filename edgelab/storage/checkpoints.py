"""Checkpoints: where a run of training has got to, so that one that was stopped can go on."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from edgelab import assets

EVERY_S = 120.0  # a second of writing for a model of 135 M parameters and its optimizer, 1.6 GB


@dataclass(frozen=True)
class Checkpoint:
    """Where a run is kept until it has ended. folder: of this run alone. every_s: seconds from one to the next."""

    folder: Path
    every_s: float = EVERY_S

    def save(self, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
        """Keep tensors by name and what JSON can say; an earlier checkpoint is replaced whole."""
        with assets.staged(self.folder) as draft:
            draft.mkdir()
            save_file(
                {name: tensor.detach().contiguous() for name, tensor in tensors.items()},
                draft / "state.safetensors",
            )
            (draft / "state.json").write_text(json.dumps(about))

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What was kept last; None where there is nothing, or nothing that can be read."""
        try:
            about = json.loads((self.folder / "state.json").read_text())
            with safe_open(self.folder / "state.safetensors", "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, about  # noqa: SIM118
        except (OSError, ValueError, SafetensorError):
            return None

    def remove(self) -> None:
        """The run has ended."""
        shutil.rmtree(self.folder, ignore_errors=True)
