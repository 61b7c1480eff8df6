"""What removing buys in milliseconds: whole models against what their parts predict, and torch's sparse kernel."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from edgelab import corpora, recipes, reference, runtimes
from edgelab.runtimes.session import Session
from edgelab.storage import variants

RECIPES = {  # and the parts of the baseline that they change; what goes is chosen quickly, since time is as good of any
    "prune.layers:keep=20,by=even": r"layers.N",
    "prune.channels:by=magnitude": r"layers.N.mlp",
    "prune.heads:groups=2,by=magnitude": r"layers.N.self_attn",
}
ROUNDS, PROMPT, DECODED = 12, 128, 16
SHAPE = (1536, 576)  # of a projection of the embedded model
SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95)


@contextmanager
def timed(model: nn.Module, kind: str) -> Iterator[dict[str, float]]:
    """Seconds that the modules of one kind take in all, by name, for as long as this lasts."""
    spent: dict[str, float] = defaultdict(float)
    started: dict[str, float] = {}
    hooks = []

    def before(name: str) -> Callable:
        return lambda *_: started.__setitem__(name, time.perf_counter())

    def after(name: str) -> Callable:
        return lambda *_: spent.__setitem__(name, spent[name] + time.perf_counter() - started[name])

    for name, module in model.named_modules():
        if ".".join("N" if part.isdigit() else part for part in name.split(".")) == f"model.{kind}":
            hooks += [
                module.register_forward_pre_hook(before(name)),
                module.register_forward_hook(after(name)),
            ]
    try:
        yield spent
    finally:
        for hook in hooks:
            hook.remove()


def turn(session: Session, prompt: list[int]) -> tuple[float, float]:
    """Seconds of reading the prompt, and of writing DECODED tokens behind it."""
    started = time.perf_counter()
    session.prefill(prompt)
    read = time.perf_counter()
    for token in prompt[:DECODED]:
        session.decode(token)
    return read - started, time.perf_counter() - read


def parts(session: Session, prompt: list[int], kind: str) -> tuple[float, float]:
    """The same, but only what the modules of a kind take."""
    with timed(session.model, kind) as reading:
        session.prefill(prompt)
    with timed(session.model, kind) as writing:
        for token in prompt[:DECODED]:
            session.decode(token)
    return sum(reading.values()), sum(writing.values())


def gains() -> Iterator[tuple[str, str, str]]:
    """The gain of a whole model ÷ the gain of its parts, prefill and decoding, in turns."""
    source = reference.resolve()
    tokenizer = reference.load_tokenizer(source)
    prompt = corpora.tokenize("wiki", tokenizer, tokens=PROMPT).ids[:PROMPT].tolist()

    def load(recipe: str) -> Session:
        folder = variants.build(recipes.parse(recipe), source, 0, lambda done, total: None)
        return runtimes.load("torch", folder)

    whole = load("none")
    for recipe, kind in RECIPES.items():
        smaller, found = load(recipe), defaultdict(list)
        turn(whole, prompt), turn(smaller, prompt)
        for _ in range(ROUNDS):
            for name, session in (("whole", whole), ("smaller", smaller)):
                found[name].append(turn(session, prompt))
                found[f"parts of {name}"].append(parts(session, prompt, kind))
        middle = {
            name: [statistics.median(times) for times in zip(*turns, strict=True)]
            for name, turns in found.items()
        }
        for place, what in enumerate(("prefill", "decoding")):
            measured = middle["whole"][place] - middle["smaller"][place]
            predicted = middle["parts of whole"][place] - middle["parts of smaller"][place]
            share = 1 - middle["smaller"][place] / middle["whole"][place]
            yield (
                f"{recipe}: {what}, gain ÷ gain of its parts (time −{share:.0%})",
                f"{measured / predicted:.2f}",
                "at least 0.9",
            )
        smaller.close()
    whole.close()


def sparse() -> Iterator[tuple[str, str, str]]:
    """Time of torch's kernel for compressed rows ÷ the dense one's, for one token and for PROMPT, float32."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(SHAPE, generator=generator)
    for sparsity in SPARSITIES:
        mask = torch.rand(SHAPE, generator=generator) >= sparsity
        rows = (weight * mask).to_sparse_csr()
        ratios = []
        for tokens in (1, PROMPT):
            inputs = torch.randn(SHAPE[1], tokens, generator=generator)
            pairs = [(seconds(rows, inputs), seconds(weight, inputs)) for _ in range(ROUNDS)]
            ratios.append(statistics.median(one / other for one, other in pairs))
        yield (
            f"torch's sparse rows at {sparsity:.0%} zeros ÷ dense, {SHAPE[0]} x {SHAPE[1]}, 1 and {PROMPT} tokens",
            " and ".join(f"{ratio:.2f}" for ratio in ratios),
            "",
        )


def seconds(matrix: torch.Tensor, inputs: torch.Tensor, times: int = 50) -> float:
    """Of one product, the mean of some."""
    started = time.perf_counter()
    for _ in range(times):
        torch.mm(matrix, inputs)
    return (time.perf_counter() - started) / times


def rows() -> Iterator[tuple[str, str, str]]:
    torch.set_num_threads(2)
    with torch.inference_mode():
        yield from gains()
        yield from sparse()


if __name__ == "__main__":
    for what, value, bound in rows():
        print(what, "|", value, "|", bound)
