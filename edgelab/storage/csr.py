"""Compressed sparse rows: of every value its column, of every row where it begins. What sparse kernels read.

A column takes as many bytes as a float32, so that half of the weights take as much as all of them dense.
"""

from __future__ import annotations

import torch
from torch import Tensor

from edgelab.storage.matrix import stored_as
from edgelab.storage.sparse import GRID, SparseMatrix, read_values, stored_values


@stored_as("csr", side=("columns", "row_starts", *GRID))
class CompressedRows(SparseMatrix):
    """4 bytes a value for its column and 4 a row, int32 both, and the values."""

    def stored(self) -> tuple[dict[str, Tensor], dict[str, object]]:
        where = self.mask
        tensors, how = stored_values(self.dense, where)
        starts = torch.zeros(len(where) + 1, dtype=torch.int32)
        starts[1:] = where.sum(1).cumsum(0)
        places = {"columns": where.nonzero()[:, 1].int(), "row_starts": starts}
        return {**places, **tensors}, {"shape": list(self.shape), **how}

    @classmethod
    def restored(cls, tensors: dict[str, Tensor], how: dict) -> CompressedRows:
        starts, columns = tensors["row_starts"], tensors["columns"]
        rows = torch.arange(how["shape"][0]).repeat_interleave(starts.diff().long())
        where = torch.zeros(how["shape"], dtype=torch.bool)
        where[rows, columns.long()] = True
        return cls(read_values(tensors, how, where))
