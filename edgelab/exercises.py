"""Checked exercises of the notebooks: `check(name, answer)` says whether an answer is right, or gives a hint.

An exercise is a question, the right number, and the numbers that usual mistakes lead to, each with its hint.
One decorator registers the function that computes them, so that no answer is written down as a bare number.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from edgelab import ledger
from edgelab.devices import catalogue, inference_memory, models
from edgelab.errors import EdgeLabError
from edgelab.techniques.quantization.rtn import quantize_affine


@dataclass(frozen=True)
class Exercise:
    """`answer` is right within the relative `tolerance`; `mistakes` pair wrong answers with their hints."""

    answer: float
    why: str  # shown with the right answer
    hint: str  # for answers that no mistake explains
    mistakes: list[tuple[float, str]] = field(default_factory=list)
    tolerance: float = 0.02


EXERCISES: dict[str, Callable[[], Exercise]] = {}


class UnknownExercise(EdgeLabError):
    """No exercise has that name."""


def exercise(make: Callable[[], Exercise]) -> Callable[[], Exercise]:
    """Register a function that makes an exercise under the function's name."""
    EXERCISES[make.__name__] = make
    return make


def check(name: str, answer: Any) -> str:
    """One line: right and why, or a hint. An answer of None asks for a number.

    Raises UnknownExercise, naming the exercises, where there is none called `name`.
    """
    if name not in EXERCISES:
        raise UnknownExercise(f"No exercise is called {name!r}; there are {', '.join(sorted(EXERCISES))}.")
    asked = EXERCISES[name]()
    if answer is None:
        return f"Replace None by a number. Hint: {asked.hint}"
    try:
        number = float(answer)
    except (TypeError, ValueError):
        return f"A number is needed, not {answer!r}. Hint: {asked.hint}"
    if _near(number, asked.answer, asked.tolerance):
        return f"Right: {asked.answer:,.4g}. {asked.why}"
    for wrong, hint in asked.mistakes:
        if _near(number, wrong, asked.tolerance):
            return f"Not yet: {hint}"
    direction = "too large" if number > asked.answer else "too small"
    return f"Not yet, {number:,.4g} is {direction}. {asked.hint}"


def _near(number: float, target: float, tolerance: float) -> bool:
    return abs(number - target) <= tolerance * abs(target)


@exercise
def cache_of_70b() -> Exercise:
    """KV cache in GB of Llama-2-70B for 8 sequences of 4,096 tokens in 16 bits."""
    shape = models()["Llama-2-70B"]
    right = inference_memory(shape, context=4096, batch=8, kv_bits=16).kv_cache_gb
    return Exercise(
        answer=right,
        why="Grouped-query attention made it 8 times smaller: 64 query heads share 8 key-value heads.",
        hint="2 (keys and values) × layers × kv_heads × head_dim × tokens × sequences × bytes per value.",
        mistakes=[
            (right * 1e9 / 2**30, "you divided by 2³⁰; a GB here is 10⁹ bytes."),
            (
                right * 8,
                "eight times too much: only the 8 key-value heads are cached, and 16 bits are 2 bytes.",
            ),
            (right * 64, "count the 8 key-value heads, not the 64 query heads, and bytes, not bits."),
            (right / 2, "keys and values are both cached."),
            (right / 8, "that is one sequence; there are 8."),
        ],
    )


@exercise
def bits_for_13b() -> Exercise:
    """The most bits, of 16, 8, 4, 3 and 2, at which Llama-2-13B with 4,096 tokens fits a Jetson Orin Nano."""
    shape = models()["Llama-2-13B"]
    memory_gb = next(device.memory_gb for device in catalogue() if device.name == "Jetson Orin Nano")
    needs = {bits: inference_memory(shape, bits, context=4096) for bits in (16, 8, 4, 3, 2)}
    return Exercise(
        answer=max(bits for bits, need in needs.items() if need.total_gb <= memory_gb),
        why=f"The weights alone would fit at 4 bits, but the cache adds {needs[4].kv_cache_gb:.2f} GB.",
        hint=f"inference_memory(shape, bits, context=4096).total_gb has to stay under {memory_gb:g} GB.",
        mistakes=[
            (
                bits,
                f"the weights take {need.weights_gb:.2f} GB, but everything {need.total_gb:.2f} GB.",
            )
            for bits, need in needs.items()
            if need.weights_gb <= memory_gb < need.total_gb
        ],
    )


@exercise
def group_within_budget() -> Exercise:
    """The smallest of the group sizes 32, 64, 96, 192 with which asymmetric 4-bit weights take at most 4.25 bits."""
    bits, budget, sizes = 4, 4.25, (32, 64, 96, 192)
    stored = {size: bits + (16 + bits) / size for size in sizes}
    without_zero_points = min(size for size in sizes if bits + 16 / size <= budget)
    return Exercise(
        answer=min(size for size in sizes if stored[size] <= budget),
        why=f"Groups of 64 take {stored[64]} bits, groups of 96 take {stored[96]:.3f}.",
        hint="bits + (16 bits of the scale + the bits of a zero-point) / group size.",
        mistakes=[
            (without_zero_points, "that counts the scales only; every group also stores a 4-bit zero-point."),
            (192, "that is within the budget, but a smaller group is too."),
            (32, f"groups of 32 take {stored[32]} bits."),
        ],
    )


@exercise
def levels_of_symmetric_two_bits() -> Exercise:
    """To how many of the four levels of a symmetric 2-bit grid a weight is ever rounded."""
    weight = torch.linspace(-1, 1, 64)[None]
    return Exercise(
        answer=quantize_affine(weight, bits=2, group_size=0, symmetric=True).integers.unique().numel(),
        why="The largest weight is one step from zero, so that the level at minus two steps is never used.",
        hint="The scale is max |w| / (2¹ - 1): how many steps of it is the weight farthest from zero?",
        mistakes=[
            (
                4,
                "the grid has four levels, but look at the lowest one in the widget: does any weight go there?",
            ),
            (2, "zero is a level too."),
        ],
    )


@exercise
def word_to_token_perplexity() -> Exercise:
    """Perplexity per token of a text with word perplexity 30 and 1.4 tokens per word."""
    words, tokens_per_word = 30.0, 1.4
    return Exercise(
        answer=words ** (1 / tokens_per_word),
        why="The NLL of a word, log 30, is shared by its 1.4 tokens.",
        hint="The NLL per word is the NLL per token × tokens per word, and perplexity is exp of either.",
        mistakes=[
            (words / tokens_per_word, "the NLL is divided by tokens per word, not the perplexity."),
            (
                words**tokens_per_word,
                "there are more tokens than words, so each token has less NLL than a word.",
            ),
            (words * tokens_per_word, "multiply or divide the NLL, which is log 30, not the perplexity."),
            (math.log(words) / tokens_per_word, "that is the NLL per token; perplexity is exp of it."),
        ],
    )


@exercise
def windows_without_pairing() -> Exercise:
    """Windows of each of two separate samples whose difference is known as well as by 8 paired windows."""
    spread, paired_spread, windows = 0.30, 0.02, 8
    right = windows * 2 * (spread / paired_spread) ** 2
    return Exercise(
        answer=right,
        why="Pairing takes out what both models find hard, and saves a factor of 450 here.",
        hint="Squared standard errors: 0.02² / 8 when paired, (0.30² + 0.30²) / n when not.",
        mistakes=[
            (right / 2, "both samples have a spread, and their variances add up."),
            (
                windows * spread / paired_spread,
                "the standard error falls with the square root of the windows.",
            ),
            (
                windows * 2 * spread / paired_spread,
                "the standard error falls with the square root of the windows.",
            ),
            (right / windows, "that is the factor; the paired comparison uses 8 windows."),
        ],
    )


@exercise
def embedding_in_8_bits() -> Exercise:
    """Stored MB of the embedded model with 4-bit linear layers in groups of 64 and an 8-bit embedding by row."""
    shape = models()["SmolLM2-135M"]
    linear = shape.linear_parameters * 4 / 8
    scales = shape.linear_parameters / 64 * (2 + 0.5)  # 16-bit scale, 4-bit zero-point
    embedding = shape.embedding_parameters + shape.vocab_size * (2 + 1)
    norms = shape.other_parameters * 4
    right = (linear + scales + embedding + norms) / 1e6
    return Exercise(
        answer=right,
        why="Rounding the embedding saves 85 MB, more than all linear layers take at 4 bits.",
        hint="106.2M linear weights at half a byte, 2.5 bytes for each 64 of them, 28.3M embedding weights at one.",
        mistakes=[
            (
                (linear + embedding) / 1e6,
                "every group of 64 stores a 16-bit scale and a 4-bit zero-point too.",
            ),
            (
                right + shape.embedding_parameters * 3 / 1e6,
                "that leaves the embedding in 32 bits; it has 8 now.",
            ),
            (
                right + shape.embedding_parameters / 1e6,
                "head and embedding are one matrix here: count it once.",
            ),
            (shape.parameters / 2e6, "the embedding has 8 bits, not 4, and groups have scales."),
        ],
    )


@exercise
def best_within_200_mb() -> Exercise:
    """The lowest perplexity of the project's reference rows (16 windows of wiki) with weights of at most 200 MB."""
    rows = [
        row
        for row in ledger.reference()
        if (row.status, row.protocol, row.corpus, row.windows) == ("ok", "edgelab-512", "wiki", 16)
        and row.badge != "simulated"
    ]
    small = [row for row in rows if row.weights_mb <= 200]
    if not small:
        raise ledger.LedgerError(
            "data/reference holds no row within 200 MB; `edgelab compare` measures some."
        )
    best = min(small, key=lambda row: row.ppl)
    return Exercise(
        answer=best.ppl,
        why=f"It is {best.recipe} with {best.weights_mb:.1f} MB.",
        hint="Keep the rows with weights_mb of at most 200, then take the smallest ppl of those.",
        mistakes=[
            (best.weights_mb, "that is its size; its perplexity is asked for."),
            *(
                (row.ppl, f"{row.recipe} takes {row.weights_mb:.0f} MB and is not the best within 200 MB.")
                for row in rows
                if abs(row.ppl - best.ppl) > 0.01 * best.ppl
            ),
        ],
        tolerance=0.005,
    )
