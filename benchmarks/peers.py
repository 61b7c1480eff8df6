"""`make peers`: edgelab's quantization beside the peer libraries, one table. Writes results/peers.md and prints it.

The same for all: the reference, calibration tokens, groups of 64 with a zero-point, all linear layers but the head,
and the windows that perplexity is measured on, by the same code. Every run has a process of its own with a time
limit; one that fails becomes a row with its reason. Expect half an hour for each bit width on two idle cores, most
of it in what learns its rounding; `--only hqq torchao quantize.rtn` leaves that out.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

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
OWN = ("quantize.rtn", "quantize.hqq", "quantize.gptq", "quantize.awq", "quantize.autoround")
PEERS = {  # as peers_worker.py knows them -> what they run
    "llmcompressor": "GPTQ, activation order",
    "auto-round": "AutoRound",
    "hqq": "HQQ",
    "torchao": "round to nearest",
}


@dataclass(frozen=True)
class Result:
    """One row of the table. error: why there is no number, or empty."""

    technique: str
    by: str
    bits: int
    ppl: float | None = None
    bits_per_weight: float | None = None
    seconds: float | None = None
    error: str = ""


class Contestant:
    """In a process of its own: the reference changed by a recipe, or by the weights that a peer wrote; and measured."""

    def __init__(self, model: str) -> None:
        self.reference = reference.load(model)

    def own(self, recipe: str, windows: int) -> dict[str, float]:
        """Apply a recipe of one technique. Its linear layers are measured dequantized, as a peer's are."""
        (technique,) = recipes.parse(recipe).techniques
        context = Context(tokenizer=self.reference.tokenizer)
        torch.manual_seed(context.seed)
        started = time.perf_counter()
        model = technique.apply(self.reference.model, context)
        seconds = time.perf_counter() - started
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

    def peer(self, weights: str, bits: int, windows: int) -> float:
        """Perplexity with a peer's weights in place of the linear layers. Raises where they are not on its grid."""
        model = self.reference.model
        layers, tensors = linear_layers(model), load_file(weights)
        if tensors.keys() != {f"{name}.weight" for name in layers}:
            raise ValueError(f"it quantized {len(tensors)} of {len(layers)} linear layers")
        for name, layer in layers.items():
            values = most_values(tensors[f"{name}.weight"], GROUP_SIZE)
            if values > 2**bits:
                raise ValueError(f"a group of {name} holds {values} values, more than {bits} bits can tell")
            layer.weight.data = tensors[f"{name}.weight"]
        return self._perplexity(model, windows)

    def _perplexity(self, model: nn.Module, windows: int) -> float:
        text = corpora.tokenize("wiki", self.reference.tokenizer)
        return perplexity.evaluate(model, self.reference.tokenizer, text, limit=windows).ppl


def most_values(weight: Tensor, group_size: int) -> int:
    """The most different values in any group. weight: (out_features, in_features)."""
    ordered = weight.reshape(-1, group_size).sort(-1).values  # (groups, group_size)
    return 1 + int((ordered.diff(dim=-1) > 0).sum(-1).max())


def own(method: str, bits: int, asked: argparse.Namespace) -> Result:
    """One of edgelab's techniques."""
    text = f"{method}:bits={bits},group_size={GROUP_SIZE}"
    try:
        (technique,) = recipes.parse(text).techniques
        if isinstance(technique, calibration.Calibrated):
            technique = dataclasses.replace(technique, samples=asked.samples, length=asked.length)
        text = str(recipes.Recipe((technique,)))
        with contestant(asked) as bench:
            return Result(text, "edgelab", bits, **bench.call("own", recipe=text, windows=asked.windows))
    except (recipes.RecipeError, IsolatedError) as error:
        return Result(text, "edgelab", bits, error=str(error))


def peer(name: str, bits: int, tokens: Path, asked: argparse.Namespace) -> Result:
    """One of the peers: quantized in its own environment, measured in ours."""
    technique = PEERS[name]
    with tempfile.TemporaryDirectory() as out:
        job = {
            "peer": name,
            "model": str(reference.resolve(asked.model).folder),
            "tokens": str(tokens),
            "out": out,
            "bits": bits,
            "group_size": GROUP_SIZE,
            "iterations": asked.iterations,
            "threads": asked.threads,
        }
        report = in_peers_environment(job, asked.timeout)
        by = f"{name} {report['version']}" if "version" in report else name
        if name == "auto-round":
            technique += f", {asked.iterations} iterations"
        if "error" in report:
            return Result(technique, by, bits, error=report["error"])
        try:
            with contestant(asked) as bench:
                weights = str(Path(out) / "weights.safetensors")
                ppl = bench.call("peer", weights=weights, bits=bits, windows=asked.windows)
        except IsolatedError as error:
            return Result(technique, by, bits, error=str(error))
        return Result(technique, by, bits, ppl, report["bits_per_weight"], report["seconds"])


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
    """Every contestant at every bit width, as it is done."""
    source = reference.resolve(asked.model)
    drawn = calibration.Calibrated(samples=asked.samples, length=asked.length)
    context = Context(tokenizer=reference.load_tokenizer(source))
    longest = reference.load_config(source).max_position_embeddings
    with tempfile.TemporaryDirectory() as folder:
        tokens = Path(folder) / "tokens.safetensors"
        save_file({"tokens": drawn.draw(context, longest).contiguous()}, tokens)
        for bits in asked.bits:
            for name in (*OWN, *PEERS):
                if not asked.only or name in asked.only:
                    yield own(name, bits, asked) if name in OWN else peer(name, bits, tokens, asked)


def table(rows: Iterable[Result]) -> list[str]:
    """Lines of a Markdown table: by bits from many to few, then best perplexity first, failures last."""

    def place(row: Result) -> tuple[int, bool, float]:
        return -row.bits, row.ppl is None, row.ppl or 0

    lines = [
        "| bits | technique | by | perplexity | bits per weight | seconds |",
        "| ---: | --- | --- | ---: | ---: | ---: |",
    ]
    for row in sorted(rows, key=place):
        numbers = f"{row.ppl:.2f} | {row.bits_per_weight:.3f} | {row.seconds:.1f}" if row.ppl else ""
        reason = row.error.replace("|", "/").replace("\n", " ")
        lines.append(f"| {row.bits} | `{row.technique}` | {row.by} | {numbers or f'{reason} | |'} |")
    return lines


def page(rows: list[Result], unchanged: float, asked: argparse.Namespace) -> str:
    """The table with what it was measured on. unchanged: perplexity of the reference."""
    machine = ledger.provenance(asked.threads)
    lines = [
        f"# Quantization beside the peer libraries, {datetime.date.today()}",
        "",
        f"{reference.resolve(asked.model).name}; perplexity of the first {asked.windows} windows of `wiki` under "
        f"edgelab-512, unchanged {unchanged:.2f}. Calibration: {asked.samples} × {asked.length} tokens of `web`. "
        f"Groups of {GROUP_SIZE}, asymmetric, all linear layers but the head. {machine['cpu']}, threads: "
        f"{asked.threads}, commit {machine['git_sha']}.",
        "",
        *table(rows),
        "",
        "Bits per weight: what is stored of the quantized layers, scales and zero-points included, in the form "
        "that each library stores it: hqq keeps its zero-points in float16 and fits ten 3-bit integers into 32 "
        "bits, llm-compressor keeps its scales in the float32 of the model, torchao keeps integers of any width "
        "in bytes. Seconds: quantizing alone, without importing, loading and writing.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    reader = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__.split("\n")[0])
    reader.add_argument("--model", default=reference.EMBEDDED, help="embedded, or a folder with safetensors")
    reader.add_argument("--bits", type=int, nargs="+", default=[4, 3])
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
