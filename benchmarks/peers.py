"""`make peers`: edgelab's quantization and pruning beside the peer libraries. Writes results/peers.md and prints it.

The same for all: the reference, calibration tokens, groups of 64 with a zero-point or half of the weights removed, all
linear layers but the head, and the windows that perplexity is measured on, by the same code. Every run has a process
of its own with a time limit; one that fails becomes a row with its reason. Expect half an hour for each bit width on
two idle cores, most of it in what learns its rounding, and eight minutes for each pattern of zeros;
`--only hqq torchao quantize.rtn` leaves out what it does not name. `--rounds 3` runs all in turns three times and
gives the middle of their seconds.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from edgelab import corpora, ledger, recipes, reference
from edgelab.measure import perplexity
from edgelab.measure.isolation import Isolated, IsolatedError
from edgelab.recipes import Context
from edgelab.storage import variants
from edgelab.storage.layers import PackedLinear, dense_linear
from edgelab.techniques import calibration
from edgelab.techniques.quantization.rtn import linear_layers

TOP = Path(__file__).resolve().parent.parent
WORKER = TOP / "benchmarks" / "peers_worker.py"
PYTHON = TOP / ".venv-peers" / "bin" / "python"
GROUP_SIZE = 64
PATTERNS = ("unstructured", "4:8", "2:4")
ROUNDING = ("quantize.rtn", "quantize.hqq", "quantize.gptq", "quantize.awq", "quantize.autoround")
REMOVING = ("prune.wanda", "prune.sparsegpt")
ROUNDING_PEERS = {  # as peers_worker.py knows them -> what they run
    "llmcompressor": "GPTQ, activation order",
    "auto-round": "AutoRound",
    "hqq": "HQQ",
    "torchao": "round to nearest",
}
REMOVING_PEERS = {"llmcompressor/wanda": "Wanda", "llmcompressor/sparsegpt": "SparseGPT"}
OWN, PEERS = (*ROUNDING, *REMOVING), ROUNDING_PEERS | REMOVING_PEERS


class Task(NamedTuple):
    """What contestants are asked for: a width to round to, or a pattern in which half of the weights go."""

    bits: int = 0
    pattern: str = ""

    @property
    def contestants(self) -> tuple[str, ...]:
        """Own and peers, in the order they run."""
        if self.bits:
            return *ROUNDING, *ROUNDING_PEERS
        return tuple(one for pair in zip(REMOVING, REMOVING_PEERS, strict=True) for one in pair)

    def __str__(self) -> str:
        return f"{self.bits} bits" if self.bits else f"half, {self.pattern}"


@dataclass(frozen=True)
class Result:
    """One row of the table. zeros: share of the weights. error: why there is no number, or empty."""

    technique: str
    by: str
    task: Task
    ppl: float | None = None
    bits_per_weight: float | None = None
    zeros: float | None = None
    seconds: float | None = None
    error: str = ""


class Contestant:
    """In a process of its own: the reference changed by a recipe, or by the weights that a peer wrote; and measured."""

    def __init__(self, model: str) -> None:
        self.reference = reference.load(model)

    def own(self, recipe: str, windows: int) -> dict[str, float]:
        """Apply a recipe of one technique. Quantized linear layers are measured dequantized, as a peer's are."""
        (technique,) = recipes.parse(recipe).techniques
        context = Context(tokenizer=self.reference.tokenizer)
        torch.manual_seed(context.seed)
        started = time.perf_counter()
        model = technique.apply(self.reference.model, context)
        seconds = time.perf_counter() - started
        if not any(isinstance(module, PackedLinear) for module in model.modules()):
            weights = [layer.weight for layer in linear_layers(model).values()]
            return {"ppl": self._perplexity(model, windows), "zeros": zeros(weights), "seconds": seconds}
        tensors, quantized = variants.stored_tensors(model)
        size = variants.measure_size(model, tensors, quantized)
        weights = sum(rows * columns for rows, columns in (how["shape"] for how in quantized.values()))
        packed = {name: m for name, m in model.named_modules() if isinstance(m, PackedLinear)}
        for name, layer in packed.items():
            weight = nn.Parameter(layer.tensor.dequantize(), requires_grad=False)
            model.set_submodule(name, dense_linear(weight, layer.bias))
        return {
            "ppl": self._perplexity(model, windows),
            "bits_per_weight": 8 * (size.linear_bytes + size.scales_bytes) / weights,
            "seconds": seconds,
        }

    def peer(self, weights: str, bits: int, pattern: str, windows: int) -> dict[str, float]:
        """With a peer's weights in place of the linear layers. Raises where they are not what was asked for."""
        model = self.reference.model
        layers, tensors = linear_layers(model), load_file(weights)
        if tensors.keys() != {f"{name}.weight" for name in layers}:
            raise ValueError(f"it changed {len(tensors)} of {len(layers)} linear layers")
        for name, layer in layers.items():
            weight = tensors[f"{name}.weight"]
            if bits and (values := most_values(weight, GROUP_SIZE)) > 2**bits:
                raise ValueError(f"a group of {name} holds {values} values, more than {bits} bits can tell")
            if pattern and (kept := most_kept(weight, pattern)) > 0.501:
                raise ValueError(
                    f"{name} keeps {kept:.1%} of its weights, or of a group of {pattern}, not half"
                )
            layer.weight.data = weight
        found = {"ppl": self._perplexity(model, windows)}
        return found | {"zeros": zeros(list(tensors.values()))} if pattern else found

    def _perplexity(self, model: nn.Module, windows: int) -> float:
        text = corpora.tokenize("wiki", self.reference.tokenizer)
        return perplexity.evaluate(model, self.reference.tokenizer, text, limit=windows).ppl


def most_values(weight: Tensor, group_size: int) -> int:
    """The most different values in any group. weight: (out_features, in_features)."""
    ordered = weight.reshape(-1, group_size).sort(-1).values  # (groups, group_size)
    return 1 + int((ordered.diff(dim=-1) > 0).sum(-1).max())


def most_kept(weight: Tensor, pattern: str) -> float:
    """The largest share of any group of a pattern that is not zero; of the whole matrix where it is unstructured."""
    size = weight.numel() if pattern == "unstructured" else int(pattern.partition(":")[2])
    return float((weight.reshape(-1, size) != 0).float().mean(-1).max())


def zeros(weights: list[Tensor]) -> float:
    """Share of all weights."""
    return sum(int((one == 0).sum()) for one in weights) / sum(one.numel() for one in weights)


def own(method: str, task: Task, asked: argparse.Namespace) -> Result:
    """One of edgelab's techniques."""
    text = f"{method}:" + (
        f"bits={task.bits},group_size={GROUP_SIZE}" if task.bits else f"pattern={task.pattern}"
    )
    try:
        (technique,) = recipes.parse(text).techniques
        if isinstance(technique, calibration.Calibrated):
            technique = dataclasses.replace(technique, samples=asked.samples, length=asked.length)
        text = str(recipes.Recipe((technique,)))
        with contestant(asked) as bench:
            return Result(text, "edgelab", task, **bench.call("own", recipe=text, windows=asked.windows))
    except (recipes.RecipeError, IsolatedError) as error:
        return Result(text, "edgelab", task, error=str(error))


def peer(name: str, task: Task, tokens: Path, asked: argparse.Namespace) -> Result:
    """One of the peers: run in its own environment, measured in ours."""
    technique = PEERS[name]
    with tempfile.TemporaryDirectory() as out:
        job = {
            "peer": name,
            "model": str(reference.resolve(asked.model).folder),
            "tokens": str(tokens),
            "out": out,
            **task._asdict(),
            "group_size": GROUP_SIZE,
            "iterations": asked.iterations,
            "threads": asked.threads,
        }
        report = in_peers_environment(job, asked.timeout)
        by = f"{name} {report['version']}" if "version" in report else name
        if name == "auto-round":
            technique += f", {asked.iterations} iterations"
        if "error" in report:
            return Result(technique, by, task, error=report["error"])
        try:
            with contestant(asked) as bench:
                weights = str(Path(out) / "weights.safetensors")
                found = bench.call("peer", weights=weights, windows=asked.windows, **task._asdict())
        except IsolatedError as error:
            return Result(technique, by, task, error=str(error))
        stored = report["bits_per_weight"] if task.bits else None
        return Result(technique, by, task, bits_per_weight=stored, seconds=report["seconds"], **found)


def contestant(asked: argparse.Namespace) -> Isolated:
    return Isolated(
        "benchmarks.peers:Contestant", threads=asked.threads, timeout_s=asked.timeout, model=asked.model
    )


def in_peers_environment(job: dict[str, object], timeout_s: float) -> dict[str, object]:
    """What the worker reports, or {"error": reason} where it took too long or left no report."""
    out = Path(job["out"])
    (out / "job.json").write_text(json.dumps(job))
    count = str(job["threads"])
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with (out / "said.txt").open("w") as said:
        process = subprocess.Popen(
            [PYTHON, WORKER, out / "job.json"],
            cwd=out,  # some of them leave folders where they run
            env=os.environ | quiet | dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), count),
            stdout=said,
            stderr=said,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return {"error": f"It took longer than the limit of {timeout_s:.0f} s."}
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # with the processes that it started
                process.wait()
    if (out / "report.json").is_file():
        return json.loads((out / "report.json").read_text())
    if code == -signal.SIGKILL:
        return {"error": "The process was killed, most likely because memory ran out."}
    lines = (out / "said.txt").read_text(errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
    return {"error": f"The process ended with exit code {code}: {last}"}


def baseline(asked: argparse.Namespace) -> float:
    """Perplexity of the reference itself on the same windows."""
    loaded = reference.load(asked.model)
    text = corpora.tokenize("wiki", loaded.tokenizer)
    return perplexity.evaluate(loaded.model, loaded.tokenizer, text, limit=asked.windows).ppl


def results(asked: argparse.Namespace) -> Iterator[Result]:
    """Every contestant at every task, as the task is done."""
    source = reference.resolve(asked.model)
    drawn = calibration.Calibrated(samples=asked.samples, length=asked.length)
    context = Context(tokenizer=reference.load_tokenizer(source))
    longest = reference.load_config(source).max_position_embeddings
    with tempfile.TemporaryDirectory() as folder:
        tokens = Path(folder) / "tokens.safetensors"
        save_file({"tokens": drawn.draw(context, longest).contiguous()}, tokens)
        for task in (*map(Task, asked.bits), *(Task(pattern=one) for one in asked.patterns)):
            names = [name for name in task.contestants if not asked.only or name in asked.only]
            runs = [
                [own(name, task, asked) if name in OWN else peer(name, task, tokens, asked) for name in names]
                for _ in range(asked.rounds)
            ]
            for rounds in zip(*runs, strict=True):
                seconds = [one.seconds for one in rounds if one.seconds is not None]
                middle = statistics.median(seconds) if seconds else None
                yield dataclasses.replace(rounds[0], seconds=middle)


def table(rows: Iterable[Result]) -> list[str]:
    """Lines of a Markdown table: bits from many to few, then patterns; best perplexity first, failures last."""

    def place(row: Result) -> tuple[int, str, bool, float]:
        return -row.task.bits, row.task.pattern, row.ppl is None, row.ppl or 0

    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    lines = [
        "| task | technique | by | perplexity | bits per weight | zeros | seconds |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in sorted(rows, key=place):
        said = number(row.ppl, ".2f") or row.error.replace("|", "/").replace("\n", " ")
        cells = [
            said,
            number(row.bits_per_weight, ".3f"),
            number(row.zeros, ".2%"),
            number(row.seconds, ".1f"),
        ]
        lines.append(f"| {row.task} | `{row.technique}` | {row.by} | {' | '.join(cells)} |")
    return lines


def page(rows: list[Result], unchanged: float, asked: argparse.Namespace) -> str:
    """The table with what it was measured on. unchanged: perplexity of the reference."""
    machine = ledger.provenance(asked.threads)
    lines = [
        f"# Quantization and pruning beside the peer libraries, {datetime.date.today()}",
        "",
        f"{reference.resolve(asked.model).name}; perplexity of the first {asked.windows} windows of `wiki` under "
        f"edgelab-512, unchanged {unchanged:.2f}. Calibration: {asked.samples} × {asked.length} tokens of `web`. "
        f"Groups of {GROUP_SIZE}, asymmetric; all linear layers but the head. {machine['cpu']}, threads: "
        f"{asked.threads}, commit {machine['git_sha']}.",
        "",
        *table(rows),
        "",
        "Bits per weight: what is stored of the quantized layers, scales and zero-points included, in the form "
        "that each library stores it: hqq keeps its zero-points in float16 and fits ten 3-bit integers into 32 "
        "bits, llm-compressor keeps its scales in the float32 of the model, torchao keeps integers of any width "
        "in bytes. Zeros: share of the weights. Seconds: the technique alone, without importing, loading and "
        f"writing{f', the middle of {asked.rounds} runs in turns' if asked.rounds > 1 else ''}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    reader = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__.split("\n")[0])
    reader.add_argument("--model", default=reference.EMBEDDED, help="embedded, or a folder with safetensors")
    reader.add_argument("--bits", type=int, nargs="*", default=[4, 3], help="widths to round to")
    reader.add_argument(
        "--patterns", nargs="*", choices=PATTERNS, default=PATTERNS, help="in which half goes"
    )
    reader.add_argument("--rounds", type=int, default=1, help="how often each runs, in turns")
    reader.add_argument("--only", nargs="+", choices=[*OWN, *PEERS], help="these contestants alone")
    reader.add_argument("--samples", type=int, default=64, help="calibration samples")
    reader.add_argument("--length", type=int, default=512, help="tokens of each")
    reader.add_argument("--windows", type=int, default=32, help="windows that perplexity is measured on")
    reader.add_argument("--iterations", type=int, default=100, help="steps per block of auto-round")
    reader.add_argument("--threads", type=int, default=2)
    reader.add_argument("--timeout", type=float, default=1800, help="seconds that one run may take")
    asked = reader.parse_args()
    if not PYTHON.exists() and (not asked.only or set(asked.only) & set(PEERS)):
        reader.error("the environment of the peers is not there; `make peers` creates it")
    # A benchmark that is told to stop ends the processes of its contestants, which are not in its session.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    torch.set_num_threads(asked.threads)
    place = TOP / "results" / "peers.md"
    place.parent.mkdir(exist_ok=True)
    unchanged, rows = baseline(asked), []
    for row in results(asked):
        rows.append(row)
        print(table([row])[-1], flush=True)
        place.write_text(page(rows, unchanged, asked))  # what is done stays, whatever becomes of the rest
    print(f"\n{place.read_text()}")


if __name__ == "__main__":
    main()
