"""How long one decode step and one prefill take, operation by operation: *analytic*, nothing here is measured.

    seconds of an operation = max(bytes / (bandwidth x share), operations / compute) + overhead

Decoding reads every weight once for each token, so bandwidth rules it; a prefill reads them once for the whole prompt,
so arithmetic does. A multiplication and an addition are two operations. GB is 10^9 bytes, GFLOP 10^9 operations.
Williams, Waterman and Patterson 2009, doi:10.1145/1498765.1498785.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import pandas as pd

from edgelab.devices.catalogue import Device
from edgelab.devices.memory import kv_cache_bytes
from edgelab.devices.shapes import ModelShape, ShapeError

ACTIVATION_BYTES = 2  # an input or output of a layer, in 16 bits


@dataclass(frozen=True)
class Precision:
    """Bits that each weight takes in memory, scales and zero-points included, and what it is multiplied in.

    head_bits is for the output matrix, embedding_bits for the table of inputs where that is another matrix.
    """

    name: str
    bits: float
    head_bits: float
    multiply: str = "float16"
    embedding_bits: float | None = None

    def weight_bytes(self, shape: ModelShape) -> float:
        """Bytes of all weights; norms and biases count 32 bits."""
        matrix = shape.vocab_size * shape.hidden_size
        table = 0 if shape.tied_embeddings else matrix * (self.embedding_bits or self.head_bits)
        bits = shape.linear_parameters * self.bits + matrix * self.head_bits + table
        return (bits + shape.other_parameters * 32) / 8


PRECISIONS = {
    precision.name: precision
    for precision in (
        Precision("float32", 32, 32, "float32"),
        Precision("float16", 16, 16),
        Precision("bfloat16", 16, 16),
        Precision("Q8_0", 8.5, 8.5, "int8"),  # 32 weights of 8 bits and a 16-bit scale
        Precision("Q4_1", 5.0, 8.5, "int8"),  # 32 weights of 4 bits, a 16-bit scale and a 16-bit minimum
        Precision("Q4_0", 4.5, 6.5625, "int8", 4.5),  # llama.cpp writes the head as Q6_K
        Precision(
            "Q4_K_M", 4.81, 6.5625, "int8", 4.5
        ),  # a mixture of Q4_K and Q6_K: 4.92 GB for Llama-3.1-8B
        Precision("8da4w", 4.5, 8.0, "int8"),  # ExecuTorch's: groups of 32, head and embedding 8 bits
        Precision("q4f16_1", 4.5, 4.5),  # MLC LLM's: groups of 32
        Precision(
            "int4 g64", 4.3125, 8.04, "int8"
        ),  # ours: a 16-bit scale and a 4-bit zero-point for 64 weights
    )
}


@dataclass(frozen=True)
class Engine:
    """What an engine makes of a device: its share of the bandwidth and of the compute, and seconds lost per step."""

    bandwidth_share: float = 1.0
    compute_share: float = 1.0
    overhead_s: float = 0.0  # per decode step or prefill, however many tokens it handles
    basis: str = "the limit of the hardware"


@dataclass(frozen=True)
class Operation:
    """One kind of work in a step: how often it runs, and its bytes and operations over all those times."""

    name: str
    times: int
    bytes: float
    operations: float


def operations(
    shape: ModelShape, precision: Precision, context: int, tokens: int = 1, kv_bits: int = 16
) -> list[Operation]:
    """The work of a step that adds `tokens` to a cache, after which it holds `context` tokens.

    tokens=1 is a decode step, tokens=context a prefill of the whole prompt. Only the last token passes through the
    head. Queries share the keys and values of their group, which are read once and not once per head.
    Raises ShapeError for sizes that are not positive or more tokens than the context holds.
    """
    if min(tokens, context, kv_bits) < 1 or tokens > context:
        raise ShapeError(f"A step of {tokens} tokens cannot end in a context of {context} at {kv_bits} bits.")
    hidden, vocabulary = shape.hidden_size, shape.vocab_size
    names = ["query", "key", "value", "output", *(["gate", "up"] if shape.gated_mlp else ["up"]), "down"]
    work = [
        Operation("embedding", 1, tokens * hidden * (precision.embedding_bits or precision.head_bits) / 8, 0)
    ]
    for name, (rows, columns) in zip(names, shape.linear_shapes, strict=True):
        held = rows * columns * precision.bits / 8 + tokens * (rows + columns) * ACTIVATION_BYTES
        work.append(
            Operation(name, shape.layers, shape.layers * held, shape.layers * 2 * tokens * rows * columns)
        )
    near, far = shape.windowed_layers, shape.layers - shape.windowed_layers
    seen = far * _seen(context, tokens, context) + near * _seen(context, tokens, shape.window)
    attention = 4 * shape.heads * shape.head_dim * seen  # scores, then the sum of values
    work.append(Operation("attention", shape.layers, kv_cache_bytes(shape, context, kv_bits), attention))
    values = tokens * (
        (shape.norms_per_layer + 2) * hidden + 2 * shape.intermediate_size
    )  # norms, sums, gating
    elementwise = 2 * ACTIVATION_BYTES * values  # read and written
    work.append(
        Operation("norms and sums", shape.layers, shape.layers * elementwise, shape.layers * 4 * values)
    )
    head = vocabulary * hidden
    work.append(Operation("head", 1, head * precision.head_bits / 8 + 4 * vocabulary, 2 * head))
    return work


def _seen(context: int, tokens: int, window: int) -> float:
    """Pairs of the last `tokens` of a context with what each attends to: itself and what came before, in its window."""
    whole = min(tokens, max(0, window - (context - tokens)))  # tokens whose window holds all that came before
    return whole * (context - tokens) + whole * (whole + 1) / 2 + (tokens - whole) * window


def step(
    device: Device,
    shape: ModelShape,
    precision: Precision,
    context: int,
    tokens: int = 1,
    kv_bits: int = 16,
    engine: Engine | None = None,
) -> pd.DataFrame:
    """A row for each operation: times, mb, gflop, ms, and what it is bound by; the overhead of the step is the last.

    Compute that no source gives bounds nothing. Raises ShapeError where the device's bandwidth is not known.
    """
    if not device.memory_bandwidth_gb_s:
        raise ShapeError(f"The memory bandwidth of {device.name} is not known; give a device that has one.")
    engine = engine or Engine()
    read = device.memory_bandwidth_gb_s * engine.bandwidth_share * 1e9
    compute = (device.compute_gflop_s(precision.multiply) or float("inf")) * engine.compute_share * 1e9
    rows = []
    for work in operations(shape, precision, context, tokens, kv_bits):
        memory_s, compute_s = work.bytes / read, work.operations / compute
        rows.append(
            {
                "operation": work.name,
                "times": work.times,
                "mb": work.bytes / 1e6,
                "gflop": work.operations / 1e9,
                "ms": 1e3 * max(memory_s, compute_s),
                "bound": "compute" if compute_s > memory_s else "memory",
            }
        )
    if engine.overhead_s:
        rows.append({"operation": "overhead", "times": 1, "mb": 0.0, "gflop": 0.0,
                     "ms": 1e3 * engine.overhead_s, "bound": "overhead"})  # fmt: skip
    return pd.DataFrame(rows).set_index("operation")


def decode_tok_s(
    device: Device,
    shape: ModelShape,
    precision: Precision,
    context: int = 512,
    kv_bits: int = 16,
    engine: Engine | None = None,
) -> float:
    """Tokens per second of decoding one sequence of `context` tokens."""
    return 1e3 / float(step(device, shape, precision, context, 1, kv_bits, engine)["ms"].sum())


def time_to_first_token_ms(
    device: Device,
    shape: ModelShape,
    precision: Precision,
    prompt: int = 512,
    kv_bits: int = 16,
    engine: Engine | None = None,
) -> float | None:
    """Milliseconds of prefilling `prompt` tokens; None where no source gives the device's compute."""
    if device.compute_gflop_s(precision.multiply) is None:
        return None
    return float(step(device, shape, precision, prompt, prompt, kv_bits, engine)["ms"].sum())


def token_bytes(shape: ModelShape, precision: Precision, context: int = 512, kv_bits: int = 16) -> float:
    """Bytes that a decode step reads: all weights but an untied input table, of which it is one row, and the cache."""
    return sum(work.bytes for work in operations(shape, precision, context, 1, kv_bits))


def calibrate(
    shape: ModelShape,
    precision: Precision,
    measured_tok_s: float,
    read_gb_s: float,
    split: float = 0.0,
    context: int = 512,
    kv_bits: int = 16,
) -> Engine:
    """An engine from one measured decoding rate, on a machine whose memory reads `read_gb_s`.

    A single rate cannot tell a slow reader from an idle one, so `split` says which part of the time beyond the limit is
    overhead that every step pays: 0 makes all of it a share of bandwidth, 1 all of it overhead. `choose_split` finds
    the value that predicts other measurements best. With 1 the engine reads all that the memory gives, so that its rate
    for a much larger model is an upper bound, and its basis says so.
    Raises ShapeError for a rate, bandwidth or split out of range.
    """
    if not (measured_tok_s > 0 and read_gb_s > 0 and 0 <= split <= 1):
        raise ShapeError(
            f"{measured_tok_s:g} tokens/s at {read_gb_s:g} GB/s split {split:g} cannot be calibrated on: "
            "rates are positive, and a split lies between 0 and 1."
        )
    limit_s = token_bytes(shape, precision, context, kv_bits) / (read_gb_s * 1e9)
    beyond_s = max(0.0, 1 / measured_tok_s - limit_s)
    overhead_s = split * beyond_s
    basis = f"calibrated on {measured_tok_s:.3g} tokens/s of {shape.name} in {precision.name}"
    if split == 1:
        basis += ", an upper bound for larger models"
    return Engine(limit_s / (1 / measured_tok_s - overhead_s), overhead_s=overhead_s, basis=basis)


def choose_split(
    shape: ModelShape,
    engines: Iterable[Sequence[tuple[Precision, float]]],
    read_gb_s: float,
    splits: Iterable[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    context: int = 512,
) -> float:
    """The one split that suits the measured (precision, tokens/s) of several engines best.

    Each engine is calibrated on its first rate and predicts its others; best is the smallest largest relative error.
    Where no engine has others, it is the first of `splits`.
    """
    measured = list(engines)
    device = Device("calibrated", "", None, memory_bandwidth_gb_s=read_gb_s)

    def errors(split: float) -> Iterator[float]:
        for (anchor, rate), *others in measured:
            engine = calibrate(shape, anchor, rate, read_gb_s, split, context)
            for precision, tok_s in others:
                yield abs(decode_tok_s(device, shape, precision, context, engine=engine) / tok_s - 1)

    return min(splits, key=lambda split: max(errors(split), default=0.0))
