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
from edgelab.techniques.quantization.qat import FakeQuantize
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
def decoding_at_60_percent() -> Exercise:
    """Tokens per second of 4.1 GB of weights on memory of 68 GB/s, of which decoding reaches 60 %."""
    weights_gb, read_gb_s, reached = 4.1, 68.0, 0.6
    right = reached * read_gb_s / weights_gb
    return Exercise(
        answer=right,
        why="About what 7B in 4 bits does on such a device; no faster processor would change it.",
        hint="Every token reads all weights once: tokens per second = bandwidth reached / bytes of the weights.",
        mistakes=[
            (read_gb_s / weights_gb, "that is the limit itself; decoding reaches 60 % of it."),
            (1 / right, "those are the seconds per token; tokens per second are asked for."),
            (1e3 / right, "those are ms per token; tokens per second are asked for."),
            (reached * read_gb_s * weights_gb, "more bytes make it slower: divide by them."),
        ],
    )


@exercise
def tokens_at_the_ridge() -> Exercise:
    """Tokens at once from which 4-bit weights are bound by arithmetic: memory of 25 GB/s, 1,000 GFLOP/s."""
    read_gb_s, gflop_s, bits = 25.0, 1000.0, 4
    right = gflop_s / read_gb_s * (bits / 8) / 2
    return Exercise(
        answer=right,
        why="A prompt of 128 tokens is far beyond it: fewer bits no longer help, and unpacking costs extra.",
        hint="A weight of half a byte takes part in 2 operations per token: 4 × tokens operations per byte.",
        mistakes=[
            (gflop_s / read_gb_s, "that is the ridge in operations per byte; how many tokens make as many?"),
            (2 * right, "a multiplication and an addition are two operations."),
            (right * 32 / bits, "that holds for 32-bit weights; 4 bits are half a byte."),
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


@exercise
def gradient_through_rounding() -> Exercise:
    """Sum of the gradient that five weights receive through a 2-bit grid of levels -1, 0, 1, 2."""
    weight = torch.tensor([[-3.0, 0.25, 1.75, 2.375, 5.0]], requires_grad=True)
    outer = torch.tensor([[1.0, 10.0, 100.0, 1000.0, 10_000.0]])
    scale, centre = torch.ones(1, 1), torch.ones(1, 1)
    FakeQuantize.apply(weight, scale, centre, 0, 3, True, torch.float32).backward(outer)
    return Exercise(
        answer=weight.grad.sum().item(),
        why="Only -3 and 5 are rounded to a level beyond the grid and clamped: their gradients stop.",
        hint="A gradient passes where round(w / s + z) is between 0 and 3, here with s = 1 and z = 1.",
        mistakes=[
            (outer.sum().item(), "weights that are clamped to an end of the grid receive nothing."),
            (110, "2.375 lies above the last level, but it is rounded to that level: nothing is clamped."),
            (11_110, "5 is rounded to 5 and clamped to 2: its gradient stops as well as that of -3."),
            (0, "that is the true gradient of rounding; straight through, it counts as 1 on the grid."),
            (1_111, "-3 is rounded to -3 and clamped to -1: its gradient stops as well as that of 5."),
            (1, "the gradients of 10, 100 and 1000 belong to weights on the grid."),
        ],
        tolerance=5e-5,
    )


@exercise
def gradient_of_a_step() -> Exercise:
    """By how much three rounded weights together grow with their step, without LSQ's factor."""
    weight = torch.tensor([[0.3, 0.6, 2.4]])
    scale, centre, low, high = torch.ones(1, 1, requires_grad=True), torch.full((1, 1), 2.0), 0, 3
    FakeQuantize.apply(weight, scale, centre, low, high, True, torch.float32).sum().backward()
    factor = 1 / math.sqrt(weight.numel() * (high - low))
    right = scale.grad.item() / factor
    return Exercise(
        answer=right,
        why="-0.3 and +0.4 are what rounding adds to the first two; the third sits at the end, 1 step from zero.",
        hint="round(w / s) - w / s for a weight on the grid; for one beyond it, the level of that end.",
        mistakes=[
            (right * factor, "LSQ's factor 1/√(3 · 3) is in it; leave it out."),
            (-1.3, "2.4 is beyond the grid: its rounded value is 1 · s, which grows by 1 as s does."),
            (0.1, "2.4 counts, too: it is rounded to 1 · s, which grows by 1 as s does."),
            (2.0, "that is the sum of the levels; a weight on the grid also counts - w / s."),
            (-1.1, "the sign: 0.6 is rounded up to 1, so that rounding adds 0.4."),
        ],
    )


@exercise
def five_in_a_byte() -> Exercise:
    """Bits of a ternary weight where five share a byte and 64 share a 16-bit scale."""
    per_byte, scale = 5, 16 / 64
    assert 3**per_byte <= 2**8 < 3 ** (per_byte + 1)
    return Exercise(
        answer=8 / per_byte + scale,
        why="3⁵ = 243 of the 256 values of a byte are used, and log₂ 3 = 1.585 is nearly reached.",
        hint="Bits of a byte / weights in it + bits of a scale / weights that share it.",
        mistakes=[
            (8 / per_byte, "every 64 weights store a 16-bit scale, too."),
            (2 + scale, "that is two bits for each weight, as the package stores them: four in a byte."),
            (math.log2(3) + scale, "log₂ 3 is the bound; five weights in a byte take 8/5 bits each."),
            (math.log2(3), "log₂ 3 is the bound for the integers alone, without a byte and without scales."),
            (per_byte / 8 + scale, "bits per weight, not weights per bit."),
        ],
        tolerance=0.004,
    )


@exercise
def zeros_of_a_bell_curve() -> Exercise:
    """Percent of normally distributed weights that the absmean grid rounds to zero."""
    mean_magnitude = math.sqrt(2 / math.pi)  # of a standard normal variable

    def within(distance: float) -> float:
        return 100 * math.erf(distance / math.sqrt(2))

    return Exercise(
        answer=within(mean_magnitude / 2),
        why="Nearly a third, so that the three levels are used almost equally: little of log₂ 3 bits is wasted.",
        hint="w becomes 0 where |w| is below half of mean |w|, and mean |w| of a standard normal is √(2/π).",
        mistakes=[
            (within(mean_magnitude), "the edge is at half the scale: from there on 1 is the nearer level."),
            (within(0.5), "the edge is half of mean |w|, which is 0.8, not half a standard deviation."),
            (100 / 3, "close, but computed, not guessed: the three levels are not used exactly equally."),
            (within(mean_magnitude / 2) / 2, "both sides count: -edge < w < edge."),
            (within(mean_magnitude / 2) / 100, "that is the share; the answer is in percent."),
        ],
    )
