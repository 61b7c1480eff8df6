"""What `llama-bench` measured on a device, and what else would fit there, and how fast.

llama-bench, a tool of llama.cpp, prints a line for each test: `pp512` prefills a prompt of 512 tokens, `tg128` writes
128 tokens. A line of tg says which bandwidth decoding reaches, one of pp which arithmetic rate prefill reaches:

    effective GB/s    = bytes that a token reads x tokens per second
    effective GFLOP/s = operations of the prompt / (tokens / tokens per second)

These include all that the engine loses, so that no peak has to be known. The rates that follow are *analytic*.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import pandas as pd

from edgelab.devices.bench_lines import BenchLine, BenchTextError, cache_bytes
from edgelab.devices.file_sizes import gguf_bytes, gguf_token_bytes
from edgelab.devices.roofline import PRECISIONS, Engine, operations
from edgelab.devices.shapes import ModelShape, models

KINDS = ("F16", "Q8_0", "Q4_K_M")


@dataclass(frozen=True)
class Spread:
    """The median of a figure over lines, and how far it goes: the lowest and the highest, by one deviation each."""

    value: float
    low: float
    high: float
    lines: int


@dataclass(frozen=True)
class BenchFit:
    """A device as its lines show it, in one setting (backend and threads).

    points: a row for each line that is not mixed: name, known_as (in the catalogue), kind, test, tokens (at once),
    tok_s, deviation, mb, gb_s (of decoding), flop_per_byte and gflop_s, as `plots.roofline` takes them.
    """

    setting: str
    read_gb_s: Spread
    compute_gflop_s: Spread | None
    lines: tuple[BenchLine, ...]
    points: pd.DataFrame

    def read_of(self, kind: str) -> Spread:
        """Effective GB/s of decoding, from the lines of the same kind of file where there are any, else from all."""
        return _spread([one for one in self.lines if one.work == "decode"], kind, _gb_s)

    def compute_of(self, kind: str) -> Spread | None:
        """Effective GFLOP/s of prefill, as `read_of`; None without a line of pp."""
        prefills = [one for one in self.lines if one.work == "prefill"]
        return _spread(prefills, kind, _gflop_s) if prefills else None

    def engine(self, peak_gb_s: float) -> Engine:
        """The share of a peak bandwidth that decoding reaches here, for the roofline and the device picker."""
        return Engine(
            bandwidth_share=self.read_gb_s.value / peak_gb_s,
            basis=f"calibrated on {self.read_gb_s.lines} lines of llama-bench",
        )


def fit_bench(lines: Iterable[BenchLine], setting: str = "") -> BenchFit:
    """Calibrate a device on its lines, those of one setting: by default the one that decodes fastest for its bytes.

    Raises BenchTextError where a setting is not there, or no line of it decodes.
    """
    every = list(lines)
    decoding = [one for one in every if one.work == "decode"]
    if not decoding:
        raise BenchTextError(
            "No line is a test of decoding (tg), which gives the bandwidth; run llama-bench with -n 128."
        )
    if not setting:
        setting = max(decoding, key=_gb_s).setting
    chosen = tuple(one for one in every if one.setting == setting)
    decoding = [one for one in chosen if one.work == "decode"]
    if not decoding:
        found = ", ".join(dict.fromkeys(one.setting for one in every))
        raise BenchTextError(f"No line decodes on {setting!r}; the lines ran on: {found}.")
    prefills = [one for one in chosen if one.work == "prefill"]
    points = [_point(one) for one in chosen if one.work != "mixed"]
    return BenchFit(
        setting,
        _spread(decoding, "", _gb_s),
        _spread(prefills, "", _gflop_s) if prefills else None,
        chosen,
        pd.DataFrame(points),
    )


def settings_of(lines: Iterable[BenchLine]) -> list[str]:
    """The settings that decode, the fastest for its bytes first."""
    decoding = sorted((one for one in lines if one.work == "decode"), key=_gb_s, reverse=True)
    return list(dict.fromkeys(one.setting for one in decoding))


def what_fits(
    fit: BenchFit,
    room_gb: float,
    shapes: Mapping[str, ModelShape] | None = None,
    kinds: Iterable[str] = KINDS,
    context: int = 2048,
    prompt: int = 512,
) -> pd.DataFrame:
    """A row for each model and kind of GGUF file: does it fit room_gb, and how fast would this device run it.

    shapes are by default the catalogue's. file_mb is the file, kv_cache_mb the 16-bit cache of `context` tokens, which
    may be more than the context_length that the model was made for; rates are for that full context, slow_tok_s and
    fast_tok_s from the spread of the lines; ttft_ms is for `prompt` tokens, empty without a line of pp. They are empty
    where the model does not fit. Raises BenchTextError for a room that is not positive.
    """
    if not room_gb > 0:
        raise BenchTextError(
            f"A room of {room_gb:g} GB holds nothing; give the GB that are free for a model."
        )
    rows = []
    for shape in (models() if shapes is None else shapes).values():
        cache = cache_bytes(shape, context)
        work = sum(part.operations for part in operations(shape, PRECISIONS["float16"], prompt, prompt))
        for kind in kinds:
            file, read, compute = gguf_bytes(shape, kind), fit.read_of(kind), fit.compute_of(kind)
            weights = gguf_token_bytes(shape, kind)
            fits = file + cache <= room_gb * 1e9
            rates = [
                1e9 * each / (weights + cache) if fits else None for each in (read.value, read.low, read.high)
            ]
            first = None
            if fits and compute:
                first = 1e3 * max(work / (compute.value * 1e9), weights / (read.value * 1e9))
            rows.append(
                {
                    "model": shape.name,
                    "kind": kind,
                    "context_length": shape.context_length,
                    "file_mb": file / 1e6,
                    "kv_cache_mb": cache / 1e6,
                    "fits": fits,
                }
                | dict(zip(("decode_tok_s", "slow_tok_s", "fast_tok_s"), rates, strict=True))
                | {"ttft_ms": first, "basis": _basis(read, kind, fit), "badge": "analytic"}
            )
    return pd.DataFrame(rows)


def _basis(read: Spread, kind: str, fit: BenchFit) -> str:
    own = any(one.kind == kind for one in fit.lines if one.work == "decode")
    return (
        f"{read.lines} line{'s' if read.lines > 1 else ''} of {kind if own else 'other kinds'}, {fit.setting}"
    )


def _gb_s(line: BenchLine, tok_s: float | None = None) -> float:
    return line.bytes_per_step * (tok_s or line.tok_s) / 1e9


def _gflop_s(line: BenchLine, tok_s: float | None = None) -> float:
    return line.operations_per_step / line.seconds_per_step / 1e9 * ((tok_s or line.tok_s) / line.tok_s)


def _spread(lines: list[BenchLine], kind: str, figure: Callable[..., float]) -> Spread:
    chosen = [one for one in lines if one.kind == kind] or lines
    ends = [
        figure(one, max(one.tok_s / 10, one.tok_s + way * one.deviation)) for one in chosen for way in (-1, 1)
    ]
    return Spread(median(figure(one) for one in chosen), min(ends), max(ends), len(chosen))


def _point(line: BenchLine) -> dict[str, Any]:
    return {
        "name": line.model,
        "known_as": line.shape.name if line.shape else "",
        "kind": line.kind,
        "test": f"{'pp' if line.work == 'prefill' else 'tg'}{line.tokens}"
        + f" @ d{line.depth}" * (line.depth > 0),
        "tokens": line.tokens if line.work == "prefill" else 1,
        "tok_s": line.tok_s,
        "deviation": line.deviation,
        "mb": line.size_bytes / 1e6,
        "gb_s": _gb_s(line) if line.work == "decode" else None,
        "flop_per_byte": line.operations_per_step / line.bytes_per_step,
        "gflop_s": _gflop_s(line),
    }
