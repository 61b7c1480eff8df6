"""What an adapter costs: decoding beside its base and merged into it, and the memory that training takes."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterator

import torch

from benchmarks.removing import PROMPT, ROUNDS, turn
from edgelab import corpora, recipes, reference, runtimes
from edgelab.lab.training_memory import training_memory
from edgelab.runtimes.session import Session
from edgelab.storage import variants

ADAPTER = "lora:steps=1"  # which takes as long as one of many steps
UNMERGED, MERGED = ADAPTER, f"{ADAPTER} + merge"
BOUNDS = {UNMERGED: "at least 0.6", MERGED: "0.95 to 1.05"}
TRAINED = {
    "full": "recover:loss=ce",
    "LoRA": "lora",
    "QLoRA": "quantize.rtn:bits=4,group_size=64 + qlora",
}
SPARED = "QLoRA's below LoRA's by, MB"


def speed(runtime: str) -> Iterator[tuple[str, str, str]]:
    """Decoding rate ÷ the base's, in turns, and how far merged logits are from unmerged ones."""
    source = reference.resolve()
    prompt = corpora.tokenize("wiki", reference.load_tokenizer(source), tokens=PROMPT).ids[:PROMPT].tolist()
    sessions: dict[str, Session] = {}
    for recipe in ("none", UNMERGED, MERGED):
        folder = variants.build(recipes.parse(recipe), source, 0, lambda done, total: None)
        sessions[recipe] = runtimes.load(runtime, folder)
    found = defaultdict(list)
    for counted in range(-1, ROUNDS):
        for recipe, session in sessions.items():
            with torch.inference_mode():
                spent = turn(session, prompt)[1]
            if counted >= 0:  # the first is a warm-up
                found[recipe].append(spent)
    for recipe, bound in BOUNDS.items():
        ratio = statistics.median(
            base / other for base, other in zip(found["none"], found[recipe], strict=True)
        )
        yield f"{recipe} @ {runtime}: decoding rate ÷ the base's", f"{ratio:.2f}", bound
    with torch.inference_mode():
        apart = (sessions[UNMERGED].logits(prompt) - sessions[MERGED].logits(prompt)).abs().max()
    bound = "at most 1e-4" if runtime == "torch" else ""  # an engine rounds inputs and the cache on its own
    yield f"merged and unmerged @ {runtime}: largest difference of logits", f"{apart:.1e}", bound
    for session in sessions.values():
        session.close()


def memory() -> Iterator[tuple[str, str, str]]:
    """Peak of training in a process of its own, and what shapes say of it."""
    peak = {}
    for name, recipe in TRAINED.items():
        counted, peak[name] = training_memory(recipe)
        yield (
            f"training memory, {name}: counted {1e3 * counted.peak_gb:.0f} MB ÷ measured {peak[name]:.0f} MB",
            f"{1e3 * counted.peak_gb / peak[name]:.2f}",
            "0.9 to 1.1",
        )
    yield SPARED, f"{peak['LoRA'] - peak['QLoRA']:.0f}", "at least 290"


def rows() -> Iterator[tuple[str, str, str]]:
    torch.set_num_threads(2)
    yield from memory()
    yield from speed("torch")
    yield from speed("llamacpp")


if __name__ == "__main__":
    for what, value, bound in rows():
        print(what, "|", value, "|", bound)
