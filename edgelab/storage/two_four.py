"""2:4: of every four neighbours in a row two values, and two bits for the place of each: what NVIDIA's cores read.

Half a bit a weight more than nothing, and as much as a bitmap: the pattern is made for kernels, not for bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from edgelab.storage.bits import pack, unpack
from edgelab.storage.matrix import stored_as
from edgelab.storage.sparse import GRID, SparseError, SparseMatrix, read_values, stored_values


@stored_as("two_four", side=("places", *GRID))
class TwoOfFour(SparseMatrix):
    """4 bits of places for every four weights, and two values. Raises SparseError where four hold more than two."""

    def stored(self) -> tuple[dict[str, Tensor], dict[str, object]]:
        where = self._two(self.mask)
        tensors, how = stored_values(self.dense, where)
        places = where.nonzero()[:, 1] % 4
        return {"places": pack(places.to(torch.uint8), 2), **tensors}, {"shape": list(self.shape), **how}

    @staticmethod
    def _two(mask: Tensor) -> Tensor:
        """The mask with zeros added where four neighbours have fewer than two values."""
        if mask.shape[1] % 4:
            raise SparseError(
                f"{mask.shape[1]} inputs are no multiple of 4, as format=two_four needs; use bitmap."
            )
        fours = mask.unflatten(1, (-1, 4))
        if int(fours.sum(-1).max()) > 2:
            raise SparseError("Some four neighbours hold more than two values; prune with pattern=2:4 first.")
        order = (~fours).to(torch.uint8).argsort(dim=-1, stable=True)
        return torch.zeros_like(fours).scatter_(-1, order[..., :2], True).flatten(1)

    @classmethod
    def restored(cls, tensors: dict[str, Tensor], how: dict) -> TwoOfFour:
        rows, columns = how["shape"]
        places = unpack(tensors["places"], 2, (rows, columns // 4, 2)).long()
        where = torch.zeros(rows, columns // 4, 4, dtype=torch.bool).scatter_(-1, places, True).flatten(1)
        return cls(read_values(tensors, how, where))
