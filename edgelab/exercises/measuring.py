"""Exercises of notebooks 01 and 14: perplexity, intervals, and reading rows."""

import math

import numpy as np

from edgelab import ledger
from edgelab.exercises.checking import Exercise, exercise
from edgelab.exercises.coding import CodeExercise
from edgelab.measure.intervals import mean_interval
from edgelab.rows import best_within, comparable, pareto_front


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
    right = round(windows * 2 * (spread / paired_spread) ** 2)
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
def paired_interval() -> CodeExercise:
    """Mean difference over the same windows and its 95 % interval: nll, baseline, t -> mean, low, high."""
    nll = np.array([2.95, 2.61, 3.05, 2.70, 3.11, 2.78])
    baseline = np.array([2.90, 2.58, 2.97, 2.69, 3.02, 2.72])

    def around(mean: float, reach: float) -> tuple[float, float, float]:
        return mean, mean - reach, mean + reach

    def solution(nll: np.ndarray, baseline: np.ndarray, t: float) -> tuple[float, float, float]:
        found = mean_interval(nll - baseline)
        return found.mean, found.low, found.high

    def unpaired(nll: np.ndarray, baseline: np.ndarray, t: float) -> tuple[float, float, float]:
        variance = nll.var(ddof=1) + baseline.var(ddof=1)
        return around((nll - baseline).mean(), t * math.sqrt(variance / len(nll)))

    def of_a_window(nll: np.ndarray, baseline: np.ndarray, t: float) -> tuple[float, float, float]:
        return around((nll - baseline).mean(), t * (nll - baseline).std(ddof=1))

    def of_all_windows(nll: np.ndarray, baseline: np.ndarray, t: float) -> tuple[float, float, float]:
        return around((nll - baseline).mean(), t * (nll - baseline).std() / math.sqrt(len(nll)))

    def without_t(nll: np.ndarray, baseline: np.ndarray, t: float) -> tuple[float, float, float]:
        return around((nll - baseline).mean(), (nll - baseline).std(ddof=1) / math.sqrt(len(nll)))

    return CodeExercise(
        inputs=(nll, baseline, 2.5705818),  # Student's t of five degrees of freedom, 97.5 %
        solution=solution,
        returns=("mean", "low", "high"),
        why="Both models find the same windows hard. The difference does not contain that any more.",
        hint="Take nll - baseline first. The interval reaches t × (standard deviation / √n) to both sides of the mean.",
        mistakes=[
            (
                unpaired,
                "these are the two spreads added up. Subtract window by window first, then take one spread.",
            ),
            (
                of_a_window,
                "that is the spread of one window; the mean of n windows is known √n times as well.",
            ),
            (of_all_windows, "the spread is estimated from n differences: divide by n - 1, `.std(ddof=1)`."),
            (without_t, "that is the standard error; multiply it by t."),
            (lambda nll, baseline, t: solution(baseline, nll, t), "nll - baseline, not the other way round."),
        ],
    )


@exercise
def recipes_that_nobody_beats() -> CodeExercise:
    """The Pareto front: sizes in MB and perplexities of recipes -> for each whether it is on the front."""
    mb = np.array([538.0, 269.0, 86.0, 171.0, 135.0, 86.0, 135.0])
    ppl = np.array([21.7, 21.7, 28.4, 26.7, 21.8, 26.5, 23.0])

    def solution(mb: np.ndarray, ppl: np.ndarray) -> np.ndarray:
        import pandas as pd

        front = pareto_front(pd.DataFrame({"weights_mb": mb, "ppl": ppl}), "weights_mb", "ppl")
        return np.isin(np.arange(len(mb)), front.index)

    def better_in_both(mb: np.ndarray, ppl: np.ndarray) -> np.ndarray:
        return ~((mb[:, None] < mb) & (ppl[:, None] < ppl)).any(axis=0)

    def itself_too(mb: np.ndarray, ppl: np.ndarray) -> np.ndarray:
        return ~((mb[:, None] <= mb) & (ppl[:, None] <= ppl)).any(axis=0)

    return CodeExercise(
        inputs=(mb, ppl),
        solution=solution,
        why="Three recipes are left, and every sensible choice among the seven is one of them.",
        hint="A recipe is beaten if another is at least as good in both, and better in one.",
        mistakes=[
            (
                better_in_both,
                "a recipe of the same size and a worse perplexity is beaten too: better in one is enough.",
            ),
            (
                itself_too,
                "every recipe is as good as itself, so that this leaves none: ask for better in one as well.",
            ),
            (
                lambda mb, ppl: ~solution(mb, ppl),
                "these are the ones that are beaten; the others are asked for.",
            ),
        ],
    )


@exercise
def best_within_200_mb() -> Exercise:
    """The lowest perplexity of the project's reference rows (32 windows of wiki) with weights of at most 200 MB."""
    known = comparable(ledger.frame(ledger.reference(), "reference"))
    best = best_within(known, 200)
    if best is None:
        raise ledger.LedgerError(
            "data/reference holds no row within 200 MB; `edgelab compare` measures some."
        )
    others = known.drop(index=best.name)
    return Exercise(
        answer=best["ppl"],
        why=f"It is {best['recipe']} with {best['weights_mb']:.1f} MB.",
        hint="Keep the rows with weights_mb of at most 200, then take the smallest ppl of those.",
        mistakes=[
            (best["weights_mb"], "that is its size; its perplexity is asked for."),
            *(
                (row.ppl, f"{row.recipe} takes {row.weights_mb:.0f} MB and is not the best within 200 MB.")
                for row in others.itertuples()
            ),
        ],
        tolerance=0.005,
    )
