"""What every way of storing a weight has in common, and the dictionary that each of them enters.

A format is a file of this folder: a dataclass of tensors that gives the weight back and says what is written to disk.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import ClassVar, Protocol

import torch
from torch import Tensor


class Matrix(Protocol):
    """A weight of shape (out_features, in_features) in some stored form."""

    format: ClassVar[str]  # its name in `variant.json`, set by `stored_as`
    side: ClassVar[frozenset[str]]  # stored parts that count as scales: what the weights themselves are not

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight in floating point, (out_features, in_features)."""

    def rows(self, indices: Tensor) -> Tensor:
        """Some rows only, as an embedding looks them up: (..., in_features) float32 for indices of shape (...)."""

    def stored(self) -> tuple[dict[str, Tensor], dict[str, object]]:
        """Tensors to write, by the last part of their names, and what `restored` has to know beside them.

        The description holds "shape" whatever the format; a refusal reads it before any tensor is loaded.
        """

    @classmethod
    def restored(cls, tensors: dict[str, Tensor], how: dict) -> Matrix:
        """The inverse of `stored`. Raises KeyError with the name of a tensor that is missing."""


FORMATS: dict[str, type[Matrix]] = {}


def stored_as(name: str, side: tuple[str, ...] = ()) -> Callable[[type], type]:
    """Enter a class of matrices under the name that `variant.json` gives it."""

    def enter(kind: type) -> type:
        kind.format, kind.side = name, frozenset(side)
        FORMATS[name] = kind
        return kind

    return enter


def restored(tensors: dict[str, Tensor], how: dict) -> Matrix:
    """A matrix from what `stored` gave, with its format in `how`. Raises KeyError for a missing tensor."""
    if how["format"] not in FORMATS:
        importlib.import_module(f"edgelab.storage.{how['format']}")  # a format has the name of its file
    return FORMATS[how["format"]].restored(tensors, how)
