"""Questions to tables of rows: which of them compare, which nothing beats, and what a budget buys.

A table is `ledger.frame()`, or some rows of it; what is returned has the same columns and index. Without torch.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import combinations
from typing import NamedTuple

import numpy as np
import pandas as pd

from edgelab import assets
from edgelab.errors import EdgeLabError
from edgelab.ledger import FIELDS, Field, every_field
from edgelab.measure import Asked, intervals
from edgelab.measure.intervals import Interval, PairingError
from edgelab.measure.protocols import PROTOCOLS
from edgelab.recipes import parse

log = logging.getLogger(__name__)

PROTOCOL = ["model", "protocol", "corpus", "n_tokens"]  # quality compares only where these agree
SAME_TEXT = ["model", "protocol", "corpus", "windows"]  # and here, what is not per token
BASELINE = "none"
ROUNDED = r"^(?P<method>quantize\.\w+):bits=(?P<bits>[\d.]+),group_size=(?P<group_size>\d+)$"
PRUNED = r"^(?P<method>prune\.(?:magnitude|wanda|sparsegpt)):sparsity=(?P<sparsity>[\d.]+)$"
EMBEDDING = r" \+ quantize\.embedding:[^ ]+$"
# What a row knows of all its windows together, and what it knows of each
OF_ALL = ["kld_mean", "top1_agreement", *(name for name in FIELDS if "bits_per_byte" in name)]
RECOVERED = r"^(?P<before>.+) \+ recover(?::[^ ]+)?(?P<at> @ .+)?$"
CUT = ["windows", "window_nll", "n_tokens", "nll_sum", "ppl", "delta_nll", "delta_nll_low", "delta_nll_high"]
CUT_WORDS = [name for name in FIELDS if name.startswith(("last_word", "delta_last_word"))]


class UnknownMetric(EdgeLabError):
    """A name of no field that is better low or high."""


class NotMeasured(EdgeLabError):
    """The rows hold no value that a question needs; the message says what to measure first."""


class Recommendation(NamedTuple):
    """What to use within a budget: the row, None where nothing fits, and the reason in words."""

    row: pd.Series | None
    sentence: str


def find_metric(name: str) -> Field:
    """The declaration of a field that is better low or high. Raises UnknownMetric, naming all of them."""
    known = {field: about for field, about in every_field().items() if about.better}
    if name not in known:
        raise UnknownMetric(f"no metric is called {name!r}; there are {', '.join(known)}")
    return known[name]


def compared_by(metrics: Iterable[str]) -> list[str]:
    """The columns in which rows have to agree for these fields to compare, but for the machine."""
    within = {find_metric(name).within for name in metrics}
    return PROTOCOL if "protocol" in within else SAME_TEXT if "text" in within else ["model"]


def newest(rows: pd.DataFrame, same: list[str]) -> pd.DataFrame:
    """Of rows that agree in the columns `same` the newest, the reader's before the project's."""
    ordered = rows.assign(reader=rows["source"] != "reference", place=range(len(rows)))
    ordered = ordered.sort_values(["reader", "started_at"], kind="stable")
    return rows.iloc[ordered.drop_duplicates(same, keep="last")["place"].sort_values()]


def interval_ends(rows: pd.DataFrame, name: str) -> np.ndarray:
    """Lower and upper end of a field in each row, (rows, 2), NaN where no interval was measured.

    Where the interval is one of the difference to the baseline, the baseline's value counts as known: the end is the
    row's own value moved by as much as the end of the difference is from the difference. Perplexity is exp of the NLL
    of a token, or of a word, which has several tokens.
    """
    declared = every_field()
    if ends := declared[name].ends:
        return rows[list(ends)].to_numpy(float)
    delta = "delta_nll" if name == "ppl" else f"delta_{name}"
    if delta not in declared:
        return np.full((len(rows), 2), math.nan)
    value, difference = rows[[name]].to_numpy(float), rows[[delta]].to_numpy(float)
    reach = rows[list(declared[delta].ends)].to_numpy(float) - difference
    if name != "ppl":
        return value + reach
    return value * np.exp(reach * tokens_per_unit(rows).to_numpy()[:, None])


def tokens_per_unit(rows: pd.DataFrame) -> pd.Series:
    """How many tokens there are to a unit of each row's perplexity: 1, or the tokens of a word under lm-eval-word.

    The NLL of a row and its intervals are per token; ln(ppl) is the NLL per unit.
    """
    counts_words = rows["protocol"].map(lambda name: name in PROTOCOLS and PROTOCOLS[name].unit == "word")
    numbers = rows[["n_tokens", "ppl", "nll_sum"]].astype(float)
    return (numbers["n_tokens"] * np.log(numbers["ppl"]) / numbers["nll_sum"]).where(counts_words, 1.0)


def pareto_front(rows: pd.DataFrame, x: str, y: str) -> pd.DataFrame:
    """The rows that no other row beats: none is at least as good in `x` and `y` and better in one of them.

    What is good says the field. Rows without both values are not on the front. Sorted by x, then y.
    """
    signs = [_sign(name) for name in (x, y)]
    rows = rows[np.isfinite(rows[[x, y]].astype(float)).all(axis=1)]
    cost = rows[[x, y]].to_numpy(float) * signs  # (rows, 2), lower is better
    as_good = (cost[:, None] <= cost[None]).all(axis=2)  # (rows, rows): is row i as good as row j?
    better = (cost[:, None] < cost[None]).any(axis=2)
    return rows[~(as_good & better).any(axis=0)].sort_values([x, y])


def _sign(name: str) -> int:
    """What makes lower better."""
    return 1 if find_metric(name).better == "lower" else -1


def comparable(rows: pd.DataFrame) -> pd.DataFrame:
    """The successful rows of one model, protocol, text and number of tokens: those for which most recipes have a speed.

    Rows of quality alone, as notebooks leave many on a few windows, decide only where that is a tie. A variant with
    tokens of its own has read other numbers of them: it belongs to the rows of the same windows of text.
    Raises NotMeasured where no row has perplexity and size.
    """
    rows = rows[(rows["status"] == "ok") & rows["weights_mb"].notna()]
    per_token = rows[rows["ppl"].notna()]
    if per_token.empty:
        raise NotMeasured('no row has ppl and weights_mb: measure first, for instance el.measure("none")')
    timed = per_token["recipe"].where(per_token["decode_tok_s"].notna())
    sets = per_token.assign(timed=timed).groupby(PROTOCOL, dropna=False)[["timed", "recipe"]].nunique()
    chosen = sets.sort_values(["timed", "recipe"], kind="stable").index[-1]
    kept = rows["ppl"].notna() & (rows[PROTOCOL] == list(chosen)).all(axis=1)
    texts = rows[SAME_TEXT].apply(tuple, axis=1)
    other_tokens = rows["ppl"].isna() & rows["bits_per_byte"].notna()
    return rows[kept | (other_tokens & texts.isin(texts[kept]))]


def small_embedding(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows without those whose recipe is there with `+ quantize.embedding`, too.

    Layers of 4 bits under a float embedding take twice the bytes of the same layers under an 8-bit one, so that a
    picture of both hides what the bits of the layers buy.
    """
    recipes = rows["recipe"].str.partition(" @ ")
    places = recipes[2].where(recipes[1] != "", "torch")
    bare = recipes[0].str.replace(EMBEDDING, "", regex=True)
    smaller = set(zip(bare[bare != recipes[0]], places[bare != recipes[0]], strict=True))
    twice = [pair in smaller for pair in zip(recipes[0], places, strict=True)]
    return rows[~np.array(twice, bool)]


def paired(rows: pd.DataFrame, recipe: str, baseline: str = BASELINE) -> Interval:
    """NLL of a recipe minus that of another on the same windows, in nats per token, with its 95 % interval.

    It is taken from the newest two rows that agree in model, protocol, text and tokens. Raises PairingError where the
    table holds no such two.
    """
    return difference(*_same_windows(rows, recipe, baseline))


def paired_in_words(rows: pd.DataFrame, recipe: str, baseline: str = BASELINE) -> str:
    """`paired` as a sentence, which also says whether the windows tell the two apart, or what to measure first."""
    try:
        windows = _same_windows(rows, recipe, baseline)
    except PairingError as error:
        return str(error)
    found, count = difference(*windows), len(windows[0])
    text = f"{recipe} minus {baseline}, {count} windows: {found.mean:+.4f} nats per token"
    if not math.isfinite(found.low):
        return f"{text}; one window gives no interval."
    verdict = "better" if found.high < 0 else "worse" if found.low > 0 else "not told apart by these windows"
    return f"{text}, 95 % interval {found.low:+.4f} to {found.high:+.4f}: {verdict}."


def over_seeds(rows: pd.DataFrame, recipe: str, baseline: str) -> pd.DataFrame:
    """Perplexities of two recipes by seed, and the first minus the second in NLL on the same windows, paired.

    Columns ppl, ppl_other, delta_nll, delta_nll_low and delta_nll_high, in nats per token; a row for each seed with
    which both were measured, and one called "all", over the means of each window. Raises PairingError where no seed has
    both.
    """
    found, windows = {}, {}
    for seed, same in rows[rows["recipe"].isin([recipe, baseline])].groupby("seed"):
        with suppress(PairingError):
            windows[seed] = _same_windows(same, recipe, baseline)
    if not windows:
        raise PairingError(f"No seed has rows of '{recipe}' and '{baseline}' on the same windows.")
    windows["all"] = tuple(np.mean(one, axis=0) for one in zip(*windows.values(), strict=True))
    for seed, (nll, other) in windows.items():
        between = difference(nll, other).fields("delta_nll")
        found[seed] = {"ppl": math.exp(np.mean(nll)), "ppl_other": math.exp(np.mean(other))} | between
    return pd.DataFrame.from_dict(found, orient="index").rename_axis("seed")


def overlapping(rows: pd.DataFrame) -> pd.DataFrame:
    """Every two rows whose intervals of perplexity overlap: recipe, other, and their paired difference in NLL.

    Columns delta_nll, delta_nll_low and delta_nll_high are in nats per token, recipe minus other. rows: of the same
    windows, as `comparable` keeps them.
    """
    known = newest(rows[rows["window_nll"].notna() & rows["delta_nll"].notna()], ["recipe"])
    ends = interval_ends(known, "ppl")
    found = []
    for (i, one), (j, other) in combinations(enumerate(known.to_dict("records")), 2):
        if ends[i, 0] <= ends[j, 1] and ends[j, 0] <= ends[i, 1]:
            between = difference(one["window_nll"], other["window_nll"]).fields("delta_nll")
            found.append({"recipe": one["recipe"], "other": other["recipe"], **between})
    return pd.DataFrame(found, columns=["recipe", "other", "delta_nll", "delta_nll_low", "delta_nll_high"])


def _same_windows(rows: pd.DataFrame, recipe: str, baseline: str) -> tuple[list[float], list[float]]:
    """NLL by window of the newest two rows of those recipes that read the same windows. Raises PairingError."""
    kept = rows[(rows["status"] == "ok") & rows["window_nll"].notna()]
    mine, others = (newest(kept[kept["recipe"] == name], PROTOCOL) for name in (recipe, baseline))
    pairs = mine.sort_values("started_at").merge(others, on=PROTOCOL, suffixes=("", "_other"))
    if pairs.empty:
        raise PairingError(
            f"No two rows of '{recipe}' and '{baseline}' read the same windows; measure both in one comparison."
        )
    last = pairs.iloc[-1]
    return last["window_nll"], last["window_nll_other"]


def difference(nll: list[float], other: list[float]) -> Interval:
    """Mean difference of two rows in the mean NLL of each window, where all windows score as many tokens."""
    return intervals.paired(nll, other, np.ones(len(nll)))


def first_windows(
    rows: pd.DataFrame, windows: int, corpus: str = Asked.corpus, model: str = assets.EMBEDDED_NAME
) -> pd.DataFrame:
    """Rows of one model on one text, with their quality over the first `windows` windows only.

    A row of 32 windows holds the NLL and the last words of each, so that it also answers for 4. Differences to the
    baseline and their intervals are computed anew where the table holds the baseline.
    """
    asked = {"model": model, "protocol": Asked.protocol, "corpus": corpus}
    rows = rows[rows["fast"].eq(False) | assets.fast()]  # rows of fast mode stay out of full mode
    long_enough = rows["window_nll"].map(lambda nll: isinstance(nll, list) and len(nll) >= windows)
    rows = rows[long_enough & (rows["status"] == "ok") & (rows[list(asked)] == asked).all(axis=1)]
    baseline = next((row for _, row in rows[rows["recipe"] == BASELINE].tail(1).iterrows()), None)
    cut = [_cut(row, baseline, windows) for _, row in rows.iterrows()]
    cut = pd.DataFrame(cut, rows.index, columns=[*CUT, *CUT_WORDS])
    return rows.drop(columns=[*OF_ALL, *cut], errors="ignore").join(cut)


def _cut(row: pd.Series, baseline: pd.Series | None, windows: int) -> dict[str, object]:
    """The fields of a row that change with its windows."""
    nll = row["window_nll"][:windows]
    tokens = row["n_tokens"] / len(row["window_nll"]) * windows  # every window scores as many
    mean = math.fsum(nll) / windows
    found = {
        "windows": windows,
        "window_nll": nll,
        "n_tokens": tokens,
        "nll_sum": mean * tokens,
        "ppl": math.exp(mean),
    }
    compared = baseline is not None and row["recipe"] != BASELINE
    if compared:
        found |= difference(nll, baseline["window_nll"][:windows]).fields("delta_nll")
    words = _words(row, windows)
    if words is not None:
        right = [[answer == "1" for answer in window] for window in words]
        theirs = _words(baseline, windows) if compared else None
        same = theirs is not None and [*map(len, theirs)] == [*map(len, words)]  # sentences in each window
        found |= intervals.accuracy("last_word", right, " ".join(theirs) if same else None)
    return found


def _words(row: pd.Series, windows: int) -> list[str] | None:
    """Answers on the last words of the first windows, one text a window."""
    right = row.get("last_word_right")
    return right.split(" ")[:windows] if isinstance(right, str) else None


def in_turns_tok_s(rows: pd.DataFrame) -> pd.Series:
    """Decoding rate of each row of one comparison: its ratio to the baseline, times the baseline's own rate.

    The two of a ratio were timed in turns, so that these rates compare also where the machine was slower for a while;
    `decode_tok_s` of the rows need not. Raises NotMeasured where no row of the baseline has a rate.
    """
    baseline = rows.loc[(rows["recipe"] == BASELINE) & rows["decode_tok_s"].notna(), "decode_tok_s"]
    if baseline.empty:
        raise NotMeasured(f"no row of '{BASELINE}' has a decoding rate: compare recipes with it")
    ratio = rows["decode_ratio"].where(rows["recipe"] != BASELINE, 1.0)
    return (ratio * baseline.iloc[-1]).rename("tok_s")


def best_within(
    rows: pd.DataFrame, budget_mb: float, of: str = "weights_mb", by: str = "ppl"
) -> pd.Series | None:
    """The best row `by` a field of quality whose `of` is at most `budget_mb`; None where none is.

    Simulated rows keep dense floats in memory whatever they store, so that they are never within a budget.
    """
    within = _stored(rows, by)[lambda known: known[of] <= budget_mb]
    return None if within.empty else within.iloc[(_sign(by) * within[by]).argmin()]


def _stored(rows: pd.DataFrame, by: str) -> pd.DataFrame:
    return rows[(rows["badge"] != "simulated") & rows[by].notna()]


def recommend(
    rows: pd.DataFrame, budget_mb: float, of: str = "weights_mb", by: str = "ppl"
) -> Recommendation:
    """What to use on a device with `budget_mb` for `of`, weights or process: the best row `by` a field of quality.

    The sentence says the interval, a smaller recipe that these windows do not tell from it, and what the next better
    one would need. Only rows that `comparable` keeps have an order. Raises NotMeasured as it does.
    """
    rows = comparable(rows)
    known = _stored(rows, by).dropna(subset=of)
    if known.empty:
        raise NotMeasured(f"no row has {of} and {by} and stores what it says: measure both first")
    room = f"{budget_mb:,.0f} MB ({find_metric(of).label.lower()})"
    best = best_within(known, budget_mb, of, by)
    if best is None:
        small = known.iloc[known[of].argmin()]
        return Recommendation(
            None, f"Nothing measured fits {room}; the smallest is {small['recipe']} with {small[of]:,.1f} MB."
        )
    text = f"If the device has {room}, use {best['recipe']}: {best[of]:,.1f} MB, {_said(best, by)}."
    untold = [by == "ppl" and row[of] < best[of] and _untold(row, best) for _, row in known.iterrows()]
    alike = known[np.array(untold)]
    if len(alike):
        small = alike.iloc[alike[of].argmin()]
        text += f" These windows do not tell it from {small['recipe']} with {small[of]:,.1f} MB."
    better = known[_sign(by) * known[by] < _sign(by) * best[by]]
    if better.empty:
        return Recommendation(best, f"{text} Nothing measured is better.")
    following = better.iloc[better[of].argmin()]
    needs = f"The next better one needs {following[of]:,.1f} MB"
    return Recommendation(best, f"{text} {needs} ({following['recipe']}, {_said(following, by)}).")


def _said(row: pd.Series, name: str) -> str:
    """A value with its name and interval: "perplexity 26.66 [26.30, 27.03]"."""
    about = find_metric(name)
    low, high = interval_ends(row.to_frame().T, name)[0]
    form = about.form or ".3g"
    interval = f" [{low:{form}}, {high:{form}}]" if math.isfinite(low) else ""
    return f"{about.label.lower()} {row[name]:{form}}{interval}"


def _untold(row: pd.Series, other: pd.Series) -> bool:
    """Whether the paired interval of two rows of the same windows holds zero."""
    windows = row.get("window_nll"), other.get("window_nll")
    if not all(isinstance(one, list) for one in windows) or len(windows[0]) != len(windows[1]):
        return False
    found = difference(*windows)
    return found.low <= 0 <= found.high


def by_method(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of one method with bits and group_size and all else at its default: with columns method, bits, group_size.

    They are read from the canonical text, which names both. Of several rows of a recipe the last counts.
    """
    rows = rows.drop_duplicates("recipe", keep="last")
    settings = rows["recipe"].str.extract(ROUNDED)
    found = rows.join(settings).dropna(subset="method")
    return found.assign(**found[["bits", "group_size"]].apply(pd.to_numeric))


def by_sparsity(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows that prune single weights at some sparsity, with all else at its default: with columns method and sparsity.

    Of several rows of a recipe the last counts.
    """
    rows = rows.drop_duplicates("recipe", keep="last")
    found = rows.join(rows["recipe"].str.extract(PRUNED)).dropna(subset="method")
    return found.assign(sparsity=pd.to_numeric(found["sparsity"]))


def of_recipes(rows: pd.DataFrame, recipes: Sequence[str]) -> pd.DataFrame:
    """The newest row of each recipe, in the order asked for; recipes without one are left out and named in the log.

    recipes: canonical texts, as `str(parse(text))` gives them.
    """
    known = newest(rows[rows["recipe"].isin(recipes)], ["recipe"])
    there = set(known["recipe"])
    if missing := [recipe for recipe in recipes if recipe not in there]:
        log.warning("Not measured yet, and left out here: %s.", "; ".join(missing))
    return known.sort_values("recipe", key=lambda texts: texts.map(list(recipes).index), kind="stable")


def by_name(rows: pd.DataFrame, recipes: Mapping[str, str]) -> pd.DataFrame:
    """The newest row of each recipe, with the name that it has in `recipes` as index; the others as in `of_recipes`.

    Raises RecipeError for what is no recipe.
    """
    names = {str(parse(recipe)): name for name, recipe in recipes.items()}
    found = of_recipes(rows, list(names))
    return found.set_index(found["recipe"].map(names))


def without_recovery(recipes: pd.Series) -> pd.Series:
    """Each recipe as it was before the `recover` that ends it; one that does not end so stays as it is."""
    return recipes.str.replace(RECOVERED, r"\g<before>\g<at>", regex=True)


def before_and_after(rows: pd.DataFrame, by: str = "ppl") -> pd.DataFrame:
    """A field of quality before and after recovery: recipe (before), train_tokens, before, after, fast.

    Only rows that agree in what the field compares by are a pair; of several of a recipe the newest counts.
    """
    same = compared_by([by])
    known = newest(rows[(rows["status"] == "ok") & rows[by].notna()], ["recipe", *same])
    known = known.assign(before=without_recovery(known["recipe"]))
    after = known[known["before"] != known["recipe"]]
    pairs = after.merge(
        known, left_on=["before", *same], right_on=["recipe", *same], suffixes=("", "_before")
    )
    columns = {
        "before": "recipe",
        "train_tokens": "train_tokens",
        f"{by}_before": "before",
        by: "after",
        "fast": "fast",
    }
    return (
        pairs[list(columns)]
        .rename(columns=columns)
        .sort_values(["recipe", "train_tokens"], ignore_index=True)
    )
