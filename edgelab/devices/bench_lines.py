"""What `llama-bench`, a tool of llama.cpp, printed: its Markdown table, CSV, JSON or JSONL as lines.

Fields and tables: tools/llama-bench/llama-bench.cpp of github.com/ggml-org/llama.cpp.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from edgelab.assets import data_dir
from edgelab.devices.file_sizes import MIXTURES, gguf_token_bytes, gguf_weight_bytes
from edgelab.devices.memory import kv_cache_bytes
from edgelab.devices.roofline import PRECISIONS, operations
from edgelab.devices.shapes import ModelShape, models
from edgelab.errors import EdgeLabError

ARCHITECTURES = {  # of llama.cpp: the model_type of transformers
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "phi2": "phi",
    "phi3": "phi3",
    "stablelm": "stablelm",
    "olmo2": "olmo2",
    "gptneox": "gpt_neox",
}
NAMES = {  # heading of the Markdown table: field of the other formats
    "model": "model_type",
    "size": "model_size",
    "params": "model_n_params",
    "backend": "backends",
    "threads": "n_threads",
    "ngl": "n_gpu_layers",
    "t/s": "avg_ts",
}
NEEDED = ("model_type", "model_size", "model_n_params", "avg_ts")
UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "M": 1e6, "B": 1e9, "T": 1e12, "": 1}
KIND = re.compile(r"\b(IQ4_XS|IQ4_NL|BF16|F16|F32|Q\d_[01K])(?: - (Small|Medium|Large))?")
TEST = re.compile(r"^(?:pp ?(\d+))?\+?(?:tg ?(\d+))?(?: @ d(\d+))?$")
ON_CPU = {"CPU", "BLAS", "ZenDNN"}  # backends without layers on a GPU
UBATCH = 512  # tokens that llama.cpp prefills at once, by default
SAME_SIZE = 0.001  # a file may hold some factors more, or tokens that were added
HOW = "run `llama-bench -m model.gguf` on the device and paste all that it prints"


class BenchTextError(EdgeLabError):
    """A text that is none of llama-bench, or lines that cannot calibrate a device."""


@dataclass(frozen=True)
class BenchLine:
    """One test of llama-bench.

    size_bytes: of all tensors. work: "decode" (tg), "prefill" (pp), or "mixed", one after the other. tokens: of the
    prompt, or those that are written; depth: tokens that the cache held before. deviation: of tok_s over the runs.
    """

    model: str  # as llama.cpp names it, such as "llama 3B Q4_K - Medium"
    kind: str  # such as Q4_K_M; "" where the sizes of such files are not known here
    size_bytes: float
    parameters: float
    backend: str
    threads: int | None
    gpu_layers: int | None
    work: str
    tokens: int
    depth: int
    tok_s: float
    deviation: float

    @property
    def setting(self) -> str:
        """What the line ran on, in words: "CPU, 8 threads" or "OpenCL, 99 layers on the GPU"."""
        parts = [self.backend or "unknown backend"]
        if self.gpu_layers and not set(self.backend.split(",")) <= ON_CPU:
            parts.append(
                "all layers on the GPU" if self.gpu_layers < 0 else f"{self.gpu_layers} layers on the GPU"
            )
        elif self.threads:
            parts.append(f"{self.threads} threads" if self.threads > 1 else "1 thread")
        return ", ".join(parts)

    @property
    def shape(self) -> ModelShape | None:
        """The model of the catalogue that has this architecture and so many parameters, or None."""
        layout = ARCHITECTURES.get(self.model.split()[0]) if self.model.strip() else None
        alike = [one for one in models().values() if one.model_type == layout]
        nearest = min(alike, key=self._apart, default=None)
        rounded = 0.005 * (1e9 if self.parameters >= 1e9 else 1e6)  # to two decimals of B or M
        if nearest is None or self._apart(nearest) > rounded + SAME_SIZE * nearest.parameters:
            return None
        return nearest

    def _apart(self, shape: ModelShape) -> float:
        return abs(shape.parameters - self.parameters)

    @property
    def bytes_per_step(self) -> float:
        """Bytes that a decode step, or the prefill, reads: weights, and the cache where the model is known."""
        shape = self.shape
        steps = -(-self.tokens // UBATCH) if self.work == "prefill" else 1
        if shape is None:
            return steps * self.size_bytes
        unread = 0
        if self.kind:
            unread = gguf_weight_bytes(shape, self.kind) - gguf_token_bytes(shape, self.kind)
        seen = self.depth + (self.tokens if self.work == "prefill" else -(-self.tokens // 2))
        return steps * (self.size_bytes - unread) + cache_bytes(shape, max(1, seen))

    @property
    def operations_per_step(self) -> float:
        """Operations of a decode step, or of the prefill; two for each parameter and token of an unknown model."""
        shape, tokens = self.shape, self.tokens if self.work == "prefill" else 1
        if shape is None:
            return 2 * self.parameters * tokens
        seen = self.depth + (self.tokens if self.work == "prefill" else -(-self.tokens // 2))
        return sum(part.operations for part in operations(shape, PRECISIONS["float16"], max(1, seen), tokens))

    @property
    def seconds_per_step(self) -> float:
        return (self.tokens if self.work == "prefill" else 1) / self.tok_s


def cache_bytes(shape: ModelShape, tokens: int) -> float:
    """Bytes of llama.cpp's 16-bit cache, which keeps the tokens of a piece of the prefill beside those of a window.

    Source: src/llama-kv-cache-iswa.cpp of llama.cpp.
    """
    return kv_cache_bytes(replace(shape, window=shape.window + UBATCH), tokens)


def read_bench(text: str) -> list[BenchLine]:
    """The lines in what llama-bench printed: its Markdown table, with what stands around it, or its CSV, JSON or JSONL.

    Raises BenchTextError, with one sentence that says what would be right, for any other text.
    """
    if not text.strip():
        raise BenchTextError(f"The text is empty; {HOW}.")
    rows = list(_rows(text))
    if not rows:
        raise BenchTextError(
            "No line of llama-bench is in this text: its table begins with | model | size | params | backend | and "
            f"ends with | test | t/s |; {HOW} (-o csv, json and jsonl work too)."
        )
    return [_line(row, where) for where, row in rows]


def saved_bench(name: str) -> str:
    """What llama-bench printed on a device of `data/llama_bench`, such as "xiaomi_14", below its source.

    Raises BenchTextError, naming those that there are, for any other.
    """
    files = {file.stem: file for file in sorted((data_dir() / "llama_bench").glob("*.md"))}
    if name not in files:
        raise BenchTextError(f"No output of llama-bench is kept as {name!r}; there are {', '.join(files)}.")
    return files[name].read_text(encoding="utf-8")


def _rows(text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Fields by the names of CSV and JSON, and where each row stands."""
    stripped = text.strip()
    if stripped[0] in "[{":
        yield from _json_rows(stripped)
        return
    lines = text.splitlines()
    head = next(
        (number for number, line in enumerate(lines) if "model_type" in line and "avg_ts" in line), None
    )
    if head is not None:
        found = csv.DictReader(io.StringIO("\n".join(lines[head:])))
        for row in found:
            if list(row.values())[1:] == [None] * (len(row) - 1):  # a prompt of the shell, say
                continue
            if row.get(None) or None in row.values():
                raise BenchTextError(
                    f"line {head + found.line_num}: its cells are not as many as the columns; paste the lines as "
                    "llama-bench wrote them."
                )
            yield f"line {head + found.line_num}", row
        return
    heading: list[str] = []
    for number, line in enumerate(lines, 1):
        cells = _cells(line)
        if "t/s" in cells and "model" in cells:
            heading = [NAMES.get(name, name) for name in cells]
            if "test" not in heading:
                raise BenchTextError(f"line {number}: the table has no column test; paste the whole table.")
        elif heading and len(cells) == len(heading) and not set(line) <= set("|-: \t"):
            yield f"line {number}", dict(zip(heading, cells, strict=True))


def _cells(line: str) -> list[str]:
    if line.strip().startswith("|"):
        return [cell.strip() for cell in line.strip().strip("|").split("|")]
    return [cell.strip() for cell in line.split("\t")] if "\t" in line else []


def _json_rows(text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        found = (
            [json.loads(text)]
            if text[0] == "["
            else [json.loads(one) for one in text.splitlines() if one.strip()]
        )
    except ValueError:
        try:
            found = [json.loads(text)]
        except json.JSONDecodeError as error:
            raise BenchTextError(
                f"The JSON makes no sense at line {error.lineno} ({error.msg}); paste all of it, from the first "
                "bracket to the last."
            ) from None
    rows = [row for one in found for row in (one if isinstance(one, list) else [one])]
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise BenchTextError(
                f"Test {number} of the JSON is no object; paste the output of llama-bench -o json."
            )
        yield f"test {number}", row


def _line(row: Mapping[str, Any], where: str) -> BenchLine:
    if lacking := [name for name in NEEDED if row.get(name) in (None, "")]:
        shown = {theirs: ours for ours, theirs in NAMES.items()}.get(lacking[0], lacking[0])
        raise BenchTextError(
            f"{where}: there is no {shown} ({lacking[0]}); paste the lines as llama-bench wrote them."
        )
    if "test" in row:
        prompt, written, depth = _test(str(row["test"]), where)
    else:
        prompt, written, depth = (int(_number(row, name, where)) for name in ("n_prompt", "n_gen", "n_depth"))
    work = "mixed" if prompt and written else "prefill" if prompt else "decode"
    if not prompt + written:
        raise BenchTextError(f"{where}: the test has no tokens; llama-bench writes pp512 or tg128.")
    model = str(row["model_type"]).replace("mostly ", "").strip()
    rate, _, deviation = str(row["avg_ts"]).partition("±")
    figures = {"avg_ts": rate.strip(), "stddev_ts": row.get("stddev_ts") or deviation.strip() or 0}
    rate_of = {name: _number(figures, name, where) for name in figures}
    if not rate_of["avg_ts"] > 0:
        raise BenchTextError(f"{where}, column t/s: {rate.strip()} is no rate of a test; run it again.")
    return BenchLine(
        model=model,
        kind=_kind(model),
        size_bytes=_number(row, "model_size", where),
        parameters=_number(row, "model_n_params", where),
        backend=str(row.get("backends") or ""),
        threads=int(_number(row, "n_threads", where)) or None,
        gpu_layers=int(_number(row, "n_gpu_layers", where)) or None,
        work=work,
        tokens=prompt or written,
        depth=depth,
        tok_s=rate_of["avg_ts"],
        deviation=rate_of["stddev_ts"],
    )


def _test(text: str, where: str) -> tuple[int, int, int]:
    found = TEST.match(text.strip())
    if not found or not any(found.groups()):
        raise BenchTextError(f"{where}, column test: {text!r} is no test; llama-bench writes pp512 or tg128.")
    prompt, written, depth = (int(each or 0) for each in found.groups())
    return prompt, written, depth


def _number(row: Mapping[str, Any], name: str, where: str) -> float:
    """A number with its unit, such as "727.75 MiB" or "1.24 B"; 0 where there is none."""
    text = str(row.get(name) if row.get(name) is not None else "").strip()
    if not text:
        return 0.0
    number, _, unit = text.partition(" ")
    try:
        return float(number) * UNITS[unit.strip()]
    except (KeyError, ValueError):
        shown = {theirs: ours for ours, theirs in NAMES.items()}.get(name, name)
        raise BenchTextError(
            f"{where}, column {shown}: {text!r} is no number; llama-bench writes 636.18 MiB, 1.10 B or 15.23 ± 0.33."
        ) from None


def _kind(model: str) -> str:
    """The kind of file in llama.cpp's description of a model: "llama 3B Q4_K - Medium" is Q4_K_M."""
    if not (found := KIND.search(model)):
        return ""
    kind, size = found.groups()
    if size and f"{kind}_{size[0]}" in MIXTURES:
        kind = f"{kind}_{size[0]}"
    return kind if kind in MIXTURES else ""
