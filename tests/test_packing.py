"""Packing integers of 2 to 8 bits into bytes, in one piece and along the last dimension."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from edgelab.storage.kv_cache import pack_last, unpack_last
from edgelab.storage.uniform import pack, unpack

SHAPES = st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple)


@given(st.integers(1, 8), SHAPES, st.integers(0, 2**32 - 1))
def test_round_trip_and_byte_count(bits, shape, seed):
    generator = torch.Generator().manual_seed(seed)
    integers = torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=generator)
    packed = pack(integers, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (math.ceil(integers.numel() * bits / 8),)
    assert torch.equal(unpack(packed, bits, shape), integers)


@pytest.mark.parametrize(
    ("bits", "integers", "stored"),
    [
        (2, [0, 1, 2, 3], [0b11_10_01_00]),
        (2, [3, 3, 3, 3, 1], [0b11111111, 0b01]),
        (3, [1, 2, 7], [0b11_010_001, 0b1]),
        (4, [0x3, 0xA, 0xF], [0xA3, 0x0F]),
        (5, [31, 0, 31], [0b00011111, 0b1111100]),
        (8, [0, 128, 255], [0, 128, 255]),
    ],
)
def test_layout_by_hand(bits, integers, stored):
    packed = pack(torch.tensor(integers, dtype=torch.uint8), bits)
    assert packed.tolist() == stored
    assert unpack(packed, bits, (len(integers),)).tolist() == integers


@pytest.mark.parametrize("bits", range(1, 9))
def test_transposed_input_is_stored_in_its_own_order(bits):
    integers = torch.arange(12).remainder(2**bits).byte().reshape(3, 4).T  # not contiguous
    assert torch.equal(unpack(pack(integers, bits), bits, (4, 3)), integers)


def test_four_bits_pack_the_earlier_number_low():
    assert pack_last(torch.tensor([[1, 2, 15, 0]], dtype=torch.uint8), 4).tolist() == [[0x21, 0x0F]]


@given(st.sampled_from([8, 4, 2]).flatmap(lambda bits: st.tuples(
    st.just(bits), arrays("uint8", (2, 3, 8), elements=st.integers(0, 2**bits - 1)).map(torch.from_numpy)
)))  # fmt: skip
def test_packing_round_trips_in_the_format_of_weights(case):
    bits, integers = case
    assert pack_last(integers, bits).shape == (2, 3, bits)
    assert torch.equal(unpack_last(pack_last(integers, bits), bits), integers)
    assert torch.equal(pack_last(integers, bits).flatten(), pack(integers, bits))
