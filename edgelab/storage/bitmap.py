"""Bitmap: one bit a weight says whether it is there, then the values in order. It pays from any share of zeros above
one in as many as a value has bits: 3 % of float32, 6 % of float16, a quarter of 4 bits."""

from __future__ import annotations

import torch
from torch import Tensor

from edgelab.storage.bits import pack, unpack
from edgelab.storage.matrix import stored_as
from edgelab.storage.sparse import GRID, SparseMatrix, read_values, stored_values


@stored_as("bitmap", side=("bitmap", *GRID))
class Bitmap(SparseMatrix):
    """ceil(weights / 8) bytes of bitmap, and the values."""

    def stored(self) -> tuple[dict[str, Tensor], dict[str, object]]:
        where = self.mask
        tensors, how = stored_values(self.dense, where)
        return {"bitmap": pack(where.to(torch.uint8), 1), **tensors}, {"shape": list(self.shape), **how}

    @classmethod
    def restored(cls, tensors: dict[str, Tensor], how: dict) -> Bitmap:
        where = unpack(tensors["bitmap"], 1, tuple(how["shape"])).bool()
        return cls(read_values(tensors, how, where))
