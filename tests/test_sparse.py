"""Sparse formats: exact bytes, round trips over floats and integers, whole models through the disk."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgelab.recipes import Context, RecipeError, parse
from edgelab.reference import resolve
from edgelab.runtimes.eager import Eager
from edgelab.storage import matrix, variants
from edgelab.storage.bitmap import Bitmap
from edgelab.storage.csr import CompressedRows
from edgelab.storage.sparse import SparseError
from edgelab.storage.two_four import TwoOfFour
from edgelab.techniques.pruning.masks import keep_mask
from edgelab.techniques.quantization.hqq import quantize_half_quadratic
from edgelab.techniques.quantization.rtn import quantize_affine

KINDS = [Bitmap, CompressedRows, TwoOfFour]


def pruned(rows: int = 16, columns: int = 64, pattern: str = "2:4") -> torch.Tensor:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows + columns))
    return weight * keep_mask(weight.abs(), 0.5, pattern)


def bases(weight: torch.Tensor) -> dict:
    return {
        "float32": weight,
        "float16": weight.half(),
        "4 bits": quantize_affine(weight, 4, 32),
        "3 bits, symmetric": quantize_affine(weight, 3, 0, symmetric=True),
    }


def nbytes(stored) -> dict[str, int]:
    return {name: tensor.nbytes for name, tensor in stored.stored()[0].items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("base", ["float32", "float16", "4 bits", "3 bits, symmetric"])
def test_what_is_written_is_read_back(kind, base):
    sparse = kind(bases(pruned())[base])
    tensors, how = sparse.stored()
    back = matrix.restored(tensors, {"format": kind.format, **how})
    assert type(back) is kind and back.shape == (16, 64)
    assert torch.equal(back.dequantize(), sparse.dequantize())
    assert torch.equal(back.rows(torch.tensor([3, 0])), sparse.dequantize()[[3, 0]])


def test_bytes_by_hand():
    weight = pruned()  # 1,024 weights, 512 of them zero
    assert nbytes(Bitmap(weight)) == {"bitmap": 128, "values": 512 * 4}
    assert nbytes(Bitmap(weight.half())) == {"bitmap": 128, "values": 512 * 2}
    assert nbytes(TwoOfFour(weight)) == {"places": 512 * 2 // 8, "values": 512 * 4}
    assert nbytes(CompressedRows(weight)) == {"columns": 512 * 4, "row_starts": 17 * 4, "values": 512 * 4}
    integers = quantize_affine(weight, 4, 32)
    values = int((integers.dequantize() != 0).sum())  # small weights are rounded to zero, and go too
    assert nbytes(Bitmap(integers)) == {
        "bitmap": 128, "values": -(-values * 4 // 8), "scale": 2 * 32, "zero_point": 32 * 4 // 8
    }  # fmt: skip


@given(shares=st.floats(0, 1), rows=st.integers(1, 9), columns=st.integers(1, 30))
def test_any_mask_goes_through(shares, rows, columns):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    weight[torch.rand(rows, columns, generator=torch.Generator().manual_seed(columns)) < shares] = 0
    for kind in (Bitmap, CompressedRows):
        tensors, how = kind(weight).stored()
        assert torch.equal(matrix.restored(tensors, {"format": kind.format, **how}).dense, weight)


def test_what_cannot_be_left_out_is_refused():
    with pytest.raises(SparseError, match="more than two values"):
        TwoOfFour(pruned(pattern="4:8")).stored()
    with pytest.raises(SparseError, match="no multiple of 4"):
        TwoOfFour(torch.zeros(2, 6)).stored()
    with pytest.raises(SparseError, match="Zero-points between integers"):
        _ = Bitmap(quantize_half_quadratic(pruned(), 4, 32)).mask


@pytest.mark.parametrize(
    ("recipe", "kernel"),
    [
        ("prune.magnitude + prune.store", "float32 linear, zeros filled in"),
        ("prune.magnitude + prune.store:format=csr", "sparse csr mm"),
        ("prune.magnitude:pattern=2:4 + prune.store:format=two_four", "float32 linear, zeros filled in"),
        (
            "prune.magnitude + quantize.rtn:bits=4,group_size=32 + prune.store",
            "int4pack_mm bf16, zeros filled in",
        ),
    ],
)
def test_a_model_without_its_zeros_runs_like_one_with_them(recipe, kernel, tiny):
    source = resolve(str(tiny))
    dense, _, _ = recipe.rpartition(" + ")
    folders = [variants.build(parse(one), source, 0, lambda done, total: None) for one in (dense, recipe)]
    sizes = [variants.read_about(folder)["size"] for folder in folders]
    if "csr" not in recipe:
        assert (
            sizes[1]["linear_bytes"] + sizes[1]["scales_bytes"]
            < sizes[0]["linear_bytes"] + sizes[0]["scales_bytes"]
        )
    sessions = [Eager(folder) for folder in folders]
    assert sessions[1].kernel == kernel
    ids = list(range(2, 30))
    full, sparse = (session.logits(ids) for session in sessions)
    torch.testing.assert_close(sparse, full, atol=1e-3, rtol=1e-3)
    assert sizes[0]["parameters"] == sizes[1]["parameters"]


def test_a_model_without_zeros_has_nothing_to_leave_out(new_model):
    with pytest.raises(RecipeError, match="prune the model first"):
        parse("prune.store").apply(new_model("llama"), Context())
