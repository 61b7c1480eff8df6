"""What this machine reads and multiplies per second: the two limits of a roofline, measured in seconds.

    seconds of a step >= max(bytes read from memory / bandwidth, operations / rate)

A limit is what the machine can do, and whatever else runs only takes away from it: so the fastest of several runs
counts. Times of layers are medians. GB is 10^9 bytes, GFLOP 10^9 operations; a multiplication and an addition
are two.
Williams, Waterman and Patterson 2009, doi:10.1145/1498765.1498785.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

READ_MB, PRODUCT_SIZE = (
    256,
    1024,
)  # far more than a cache holds; large enough for the rate to have levelled off
RUNS_MIN, SECONDS = 3, 0.4
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)


@dataclass(frozen=True)
class Machine:
    """Limits of this machine with so many threads of torch.

    read_gb_s: GB read from memory per second. gflop_s: GFLOP per second of a large matrix product, by name of dtype.
    """

    threads: int
    read_gb_s: float
    gflop_s: dict[str, float] = field(default_factory=dict)

    def ridge(self, dtype: str) -> float:
        """Operations per byte from which arithmetic and no longer memory is the limit."""
        return self.gflop_s[dtype] / self.read_gb_s


def measure_machine(megabytes: int = READ_MB, size: int = PRODUCT_SIZE, seconds: float = SECONDS) -> Machine:
    """Measure both limits on all of torch's threads, each for about `seconds`."""
    rates = {str(dtype).removeprefix("torch."): product_gflop_s(dtype, size, seconds) for dtype in DTYPES}
    return Machine(torch.get_num_threads(), read_gb_s(megabytes, seconds), rates)


def read_gb_s(megabytes: int = READ_MB, seconds: float = SECONDS) -> float:
    """GB per second of reading a matrix that no cache holds once: by its product with a vector, or by its sum.

    The faster one counts, since the rate is a limit to engines: on Intel's processors that is the product (32 and 20
    GB/s), on AMD's the sum (50 and 15 GB/s), because the product's kernel is made for the other.
    """
    matrix = torch.ones(megabytes * 250, 1000)  # float32; written, so that its pages are there
    readers = partial(torch.mv, matrix, torch.ones(1000)), matrix.sum
    return matrix.nbytes / 1e9 / min(min(_timed(reader, seconds / 2)) for reader in readers)


def product_gflop_s(dtype: torch.dtype, size: int = PRODUCT_SIZE, seconds: float = SECONDS) -> float:
    """GFLOP per second of a product of two (size, size) matrices; int8 is summed in int32.

    A dtype that torch has no fast product for, such as float16 on many CPUs, would take minutes: where the product
    would need more than `seconds`, that of an eighth of the size stands for it.
    """
    multiply = torch._int_mm if dtype == torch.int8 else torch.mm
    rate = 0.0
    for width in (size // 8, size):
        operations = 2 * width**3 / 1e9
        if not rate or operations / rate < seconds:
            matrix = torch.ones(width, width, dtype=dtype)
            rate = operations / min(_timed(partial(multiply, matrix, matrix), seconds))
    return rate


def seconds_per_call(
    calls: Sequence[Callable[[Tensor], Tensor]], inputs: Tensor, seconds: float = SECONDS
) -> float:
    """Median seconds of one call. Going round many layers keeps their weights from being found in a cache."""
    around = itertools.cycle(calls)
    with torch.inference_mode():
        for call in calls:
            call(inputs)
        return statistics.median(_timed(lambda: next(around)(inputs), seconds, max(RUNS_MIN, len(calls))))


def layer_points(
    layers: Sequence[nn.Module], in_features: int, tokens: Sequence[int], seconds: float = SECONDS
) -> list[dict[str, float]]:
    """Layers of one shape, timed at several numbers of tokens: where each stands under the roofline.

    Returns for each: tokens, ms of a layer, flop_per_byte (of its weights, as held in memory) and gflop_s.
    """
    held = [*layers[0].parameters(), *layers[0].buffers()]
    dtype = next((tensor.dtype for tensor in layers[0].parameters()), torch.float32)
    points = []
    for count in tokens:
        inputs = torch.ones(count, in_features, dtype=dtype)
        with torch.inference_mode():
            operations = 2 * inputs.numel() * layers[0](inputs).shape[-1]
        spent = seconds_per_call(layers, inputs, seconds)
        points.append(
            {
                "tokens": count,
                "ms": 1e3 * spent,
                "flop_per_byte": operations / sum(tensor.nbytes for tensor in held),
                "gflop_s": operations / 1e9 / spent,
            }
        )
    return points


def _timed(call: Callable[[], object], seconds: float, runs: int = RUNS_MIN) -> list[float]:
    """Seconds of each of at least `runs` calls, after one to warm up, until `seconds` have gone by."""
    call()
    times: list[float] = []
    while len(times) < runs or sum(times) < seconds:
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return times
