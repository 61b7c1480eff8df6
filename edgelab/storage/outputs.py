"""What a teacher thinks of windows of text, kept on disk so that several students cost it one reading.

states   its final hidden states, 576 numbers a token where the logits would be 49,152; its head makes logits of them
         again, so that every divergence at every temperature can be had from them
top-k    the logarithms of its k most likely tokens and of all others together, at one temperature: a tenth of the
         bytes at k = 32
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from edgelab import assets
from edgelab.model.divergences import TopK
from edgelab.model.logits import head_logits, hidden_states
from edgelab.storage import cache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STATES, EVENTS, TOKENS, ABOUT = "states.npy", "events.npy", "tokens.npy", "about.json"
BATCH = 4  # windows that are read together


class _Kept:
    """A teacher (see `losses.Teacher`) that has read its windows before.

    seconds: what reading took when it was done. n_bytes: on disk. known: whether another run had it read them.
    """

    def __init__(self, windows: Tensor, folder: Path, known: bool) -> None:
        self.known = known
        self.seconds: float = json.loads((folder / ABOUT).read_text())["seconds"]
        self.n_bytes = sum(file.stat().st_size for file in folder.glob("*.npy"))
        # A student that is told the next token is given windows without their last one.
        self._places = {_name(window[:-1]): place for place, window in enumerate(windows)}
        self._places |= {_name(window): place for place, window in enumerate(windows)}

    def _read(self, array: np.ndarray, ids: Tensor) -> Tensor:
        """What is kept of windows (batch, time), (batch * time, ...). Raises KeyError for one that was not read."""
        places = [self._places[_name(window)] for window in ids]
        return torch.from_numpy(array[places][:, : ids.shape[1]]).flatten(0, 1)


class KeptStates(_Kept):
    """A teacher of which the final hidden states are kept: (windows, time, hidden), bfloat16 as int16."""

    def __init__(self, model: PreTrainedModel, windows: Tensor, folder: Path, known: bool) -> None:
        super().__init__(windows, folder, known)
        self.model, self._states = model, np.load(folder / STATES, mmap_mode="r")

    def __call__(self, ids: Tensor) -> Callable[[slice], Tensor]:
        states = self._read(self._states, ids)
        states = states.view(torch.bfloat16) if states.dtype == torch.int16 else states
        return lambda where: head_logits(self.model, states[where])


class KeptTopK(_Kept):
    """A teacher of which the likeliest tokens are kept.

    Events are log p of k tokens and of the rest, (windows, time, k + 1) float16; tokens are (windows, time, k).
    """

    def __init__(self, windows: Tensor, folder: Path, known: bool) -> None:
        super().__init__(windows, folder, known)
        self._events, self._tokens = (np.load(folder / name, mmap_mode="r") for name in (EVENTS, TOKENS))

    def __call__(self, ids: Tensor) -> Callable[[slice], TopK]:
        # Rounding to 16 bits leaves a sum that is not quite 1.
        events = torch.log_softmax(self._read(self._events, ids).float(), -1)
        tokens = self._read(self._tokens, ids).long()
        return lambda where: TopK(events[where, :-1], tokens[where], events[where, -1])


def _name(window: Tensor) -> bytes:
    return window.numpy().tobytes()


def kept_outputs(
    model: PreTrainedModel,
    windows: Tensor,
    address: str,
    top_k: int,
    temperature: float,
    progress: Callable[[int, int], None],
) -> KeptStates | KeptTopK:
    """A teacher that has read `windows` (windows, time) int64: now, or when this was last asked for.

    address: key of all arguments. top_k: of its tokens, at this temperature; 0 keeps states, which serve them all.
    Raises AssetError where nothing can be written.
    """
    folder = cache.place("states") / address
    with cache.locked(folder):
        known = (folder / ABOUT).is_file()
        if not known:
            with assets.staged(folder) as draft:
                draft.mkdir()
                started = time.perf_counter()
                read = _read(model, windows, progress)
                if top_k:
                    _write_top_k(model, read, windows, draft, top_k, temperature)
                else:
                    _write_states(read, windows, draft)
                (draft / ABOUT).write_text(json.dumps({"seconds": time.perf_counter() - started}))
            cache.trim(folder)
        cache.touch(folder)
        return KeptTopK(windows, folder, known) if top_k else KeptStates(model, windows, folder, known)


@torch.no_grad()
def _read(model: PreTrainedModel, windows: Tensor, progress: Callable[[int, int], None]) -> Iterator[Tensor]:
    """Final hidden states of some windows after the other, (batch, time, hidden)."""
    for first in range(0, len(windows), BATCH):
        with torch.autocast("cpu", torch.bfloat16, enabled=model.dtype == torch.bfloat16):
            states = hidden_states(model, windows[first : first + BATCH])
        yield states
        progress(min(first + BATCH, len(windows)), len(windows))


def _write_states(read: Iterator[Tensor], windows: Tensor, folder: Path) -> None:
    first = next(read)
    half = first.dtype == torch.bfloat16
    with _Array(folder / STATES, np.int16 if half else np.float32, (*windows.shape, first.shape[-1])) as kept:
        for states in chain([first], read):
            kept.append(states.view(torch.int16) if half else states.float())


@torch.no_grad()
def _write_top_k(
    model: PreTrainedModel,
    read: Iterator[Tensor],
    windows: Tensor,
    folder: Path,
    top_k: int,
    temperature: float,
) -> None:
    small = model.config.get_text_config().vocab_size <= np.iinfo(np.uint16).max + 1
    with (
        _Array(folder / EVENTS, np.float16, (*windows.shape, top_k + 1)) as events,
        _Array(folder / TOKENS, np.uint16 if small else np.int32, (*windows.shape, top_k)) as tokens,
    ):
        for states in read:
            for window in states:
                log_p = torch.log_softmax(head_logits(model, window).float() / temperature, -1)
                found = TopK.of(log_p, top_k)
                events.append(torch.cat([found.log_p, found.log_rest[:, None]], -1))
                tokens.append(found.index)


class _Array:
    """A file of numpy's that grows as it is written, so that a full disk is an error and not a hole in it."""

    def __init__(self, file: Path, dtype: type[np.generic], shape: tuple[int, ...]) -> None:
        self.dtype = np.dtype(dtype)
        self._file = file.open("wb")
        about = {"descr": self.dtype.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_2_0(self._file, about)

    def __enter__(self) -> _Array:
        return self

    def append(self, values: Tensor) -> None:
        self._file.write(values.numpy().astype(self.dtype).tobytes())

    def __exit__(self, *_: object) -> None:
        self._file.close()
