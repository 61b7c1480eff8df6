"""Exercises of notebooks 01 and 14: perplexity, intervals, and reading rows."""

import math

from edgelab import ledger
from edgelab.exercises.checking import Exercise, exercise
from edgelab.rows import best_within, comparable


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
def best_within_200_mb() -> Exercise:
    """The lowest perplexity of the project's reference rows (32 windows of wiki) with weights of at most 200 MB."""
    known = comparable(ledger.frame(ledger.reference(), "reference"))
    best = best_within(known, 200)
    if best is None:
        raise ledger.LedgerError(
            "data/reference holds no row within 200 MB; `edgelab compare` measures some."
        )
    others = known[(known["ppl"] - best["ppl"]).abs() > 0.01 * best["ppl"]]
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
