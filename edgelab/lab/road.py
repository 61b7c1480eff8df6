"""The one road: recipes -> questions -> plan -> stages -> measurements -> rows.

Every step that touches weights happens in a process of its own (see `bench`): a stage is made in one, quality measured
in another, latency and memory in a third, in turns with a baseline that stays loaded for a whole comparison.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from tqdm.auto import tqdm

from edgelab import assets, ledger
from edgelab.lab.plan import Step, plan
from edgelab.lab.question import NOTHING, MeasureError, Question, Settings, ask, known, quick
from edgelab.ledger import Row, ValueNotFinite
from edgelab.measure import MEASUREMENTS, Asked
from edgelab.measure.isolation import Isolated, IsolatedError, get_ready
from edgelab.measure.turn import timing_lock
from edgelab.recipes import RecipeError
from edgelab.reference import EMBEDDED

if TYPE_CHECKING:
    import pandas as pd

    from edgelab.deployments.partition.profile import Timings

DEFAULT_SET = (
    "none",
    "quantize.bf16",
    "quantize.rtn:bits=8,group_size=0",
    "quantize.rtn:bits=4,group_size=64",
    "quantize.rtn:bits=3,group_size=64",
)
OWN_WEIGHTS = ("own weights", "rounded by the engine itself: compare its quality, not its kernel")
Progress = Callable[[int, int], None]
Show = Callable[[str], Progress]


def run(recipe: str, *, model: str = EMBEDDED, **settings: object) -> Row:
    """Apply a recipe, pack the variant, measure it in fresh processes, record the row and return it.

    settings: corpus, protocol, windows, seed, threads, prompt_tokens, power_w (watts of the device while it decodes),
    only (parts joined by commas: quality, speed, memory, tasks, or the part of a measurement of your own), force
    (measure again although the ledger has the row), timeout_s. Raises MeasureError where it failed.
    """
    (row,) = stream([recipe], model=model, interleave=False, **settings)
    if row.status != "ok":
        raise MeasureError(f"{row.recipe}: {row.error}")
    return row


def compare(
    recipes: Iterable[str] = DEFAULT_SET, *, model: str = EMBEDDED, **settings: object
) -> pd.DataFrame:
    """Measure recipes one after the other, the baseline's latency interleaved with each (A B A B), as a table of rows.

    A recipe that fails becomes a row with status and reason, and the comparison goes on. Settings as in `measure`.
    """
    steps = planned(recipes, model=model, **settings)
    asked = [(step.place, row) for step, row in follow(steps) if step.place is not None]
    return ledger.frame(row for _, row in sorted(asked, key=lambda pair: pair[0]))


def stream(
    recipes: Iterable[str], *, model: str = EMBEDDED, interleave: bool = True, **settings: object
) -> Iterator[Row]:
    """As `compare`, but each row as soon as it is measured; interleave=False times each recipe by itself.

    A row that others are compared with comes before them.
    """
    for step, row in follow(planned(recipes, model=model, interleave=interleave, **settings)):
        if step.place is not None:
            yield row


def follow(steps: list[Step], show: Show | None = None) -> Iterator[tuple[Step, Row | None]]:
    """Do the steps of a plan. Each comes as soon as it is done, with its row; a stage has none.

    show: given the name of each part of a step, returns what its progress is told; without one a bar is drawn.
    """
    to_do = [step.question for step in steps if not step.is_known and "quality" in step.question.parts]
    for question in to_do[:1]:
        with _bench(question) as bench:
            bench.call("check_text")
    with _Road(show or _bar) as road:
        for step in steps:
            yield step, road.go(step)


def planned(
    recipes: Iterable[str], *, model: str = EMBEDDED, interleave: bool = True, **settings: object
) -> list[Step]:
    """What `stream` would do, in order. Everything that can be checked without a model is checked here."""
    texts = list(recipes)
    if not texts:
        raise MeasureError("There is nothing to measure; name at least one recipe, such as 'none'.")
    chosen = _settings(model, settings)
    if known := _all_known(texts, chosen, interleave):
        return known
    get_ready(chosen.threads)
    return plan(ask(texts, chosen, interleave))


def estimate_s(
    recipes: Iterable[str], *, model: str = EMBEDDED, interleave: bool = True, **settings: object
) -> float:
    """Seconds that `stream` is likely to take; 0 where the ledger has every row."""
    steps = plan(ask(list(recipes), _settings(model, settings), interleave))
    return sum(step.estimate_s for step in steps if not step.is_known)


def _all_known(texts: list[str], settings: Settings, interleave: bool) -> list[Step] | None:
    """The steps where the ledger has every answer, found without torch; None where something is to do or in doubt."""
    try:
        questions = quick(texts, settings, interleave)
    except RecipeError:  # the whole grammar may know better
        return None
    rows = known(questions) if questions else []
    if not rows or None in rows:
        return None
    pairs = zip(questions, rows, strict=True)
    return [Step(question, None, row, place) for place, (question, row) in enumerate(pairs)]


def sample(recipe: str, prompt: str, tokens: int = 40, *, model: str = EMBEDDED, seed: int = 0) -> str:
    """What a recipe writes after a prompt: its greedy continuation of so many tokens.

    The variant is made where it is not there yet. Raises an EdgeLabError where it cannot be.
    """
    (question,) = ask([recipe], _settings(model, {"seed": seed}), interleave=False)
    with _bench(question) as bench:
        bench.call("build", progress=_bar(f"{question.recipe}: build"))
        return bench.call("write", prompt=prompt, tokens=tokens)


def built(question: Question) -> Path:
    """The folder of a question's variant, made in a process of its own where it is not there yet."""
    with _bench(question) as bench:
        bench.call("build", progress=_bar(f"{question.recipe}: build"))
    return question.address


def profile(recipe: str = "none", *, model: str = EMBEDDED, seed: int = 0) -> Timings:
    """What every part of a variant takes on one thread of this machine, timed in a process of its own.

    The variant is made where it is not there yet. Raises an EdgeLabError where it cannot be.
    """
    from edgelab.deployments.partition.profile import Timings

    (question,) = ask([recipe], _settings(model, {"seed": seed}), interleave=False)
    with _bench(question) as bench:
        bench.call("build", progress=_bar(f"{question.recipe}: build"))
        with timing_lock():
            return Timings(**bench.call("profile", progress=_bar(f"{question.recipe}: profile")))


def _settings(model: str, given: dict[str, object]) -> Settings:
    defaults = {
        "threads": psutil.cpu_count(logical=False) or 1,
        "windows": 4 if assets.fast() else Settings.windows,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if unknown := set(given) - set(Settings.__dataclass_fields__):
        raise MeasureError(
            f"Unknown setting {', '.join(unknown)}; there is {', '.join(Settings.__dataclass_fields__)}."
        )
    return Settings(model=model, **defaults | given)


class _Road:
    """What goes through the steps of a plan: the rows so far, and the baseline that others take turns with."""

    def __init__(self, show: Show) -> None:
        self.show = show
        self.done: list[tuple[Question, Row]] = []
        self.lost: dict[str, IsolatedError] = {}  # stages that could not be made
        self.beside: _Timed | None = None

    def __enter__(self) -> _Road:
        return self

    def __exit__(self, *_: object) -> None:
        if self.beside is not None:
            self.beside.close()

    def go(self, step: Step) -> Row | None:
        """Do one step; a stage gives no row."""
        if step.is_known:
            row = step.row
        elif step.stage is not None:
            return self._stage(step)
        else:
            row = self._row(step.question)
        if row is not None:
            self.done.append((step.question, row))
        return row

    def _stage(self, step: Step) -> None:
        """Make a stage in a process of its own. What goes wrong is said by the row that needs it."""
        try:
            with _bench(step.question, recipe=str(step.recipe)) as bench:
                bench.call("build", progress=self.show(f"{step.recipe}: build"))
        except IsolatedError as error:
            self.lost[step.folder.name] = error

    def _row(self, question: Question) -> Row:
        """One row, measured and recorded."""
        row = question.new_row()
        started = time.perf_counter()
        try:
            if error := self.lost.get(question.address.name):
                raise error
            baseline = self._baseline(question)
            with ExitStack() as stack:
                bench = stack.enter_context(_bench(question, baseline))
                self._score(row, question, bench)
            if question.in_turns:
                self._time(row, question)
            if question.of("deployment"):
                self._serve(row, question, baseline)
        except IsolatedError as error:
            row.status, row.error = error.status, str(error)
        except ValueNotFinite as error:
            row.status, row.error = "error", str(error)
        row.duration_s = time.perf_counter() - started
        return ledger.add(row)

    def _baseline(self, question: Question) -> Row | None:
        """The baseline's row, for what is compared with it; None where nothing is, or this is the baseline."""
        if question.is_baseline or not question.outputs:
            return None
        wanted = {one.name for one in question.outputs}
        row = next(
            row
            for asked, row in reversed(self.done)
            if (asked.name, asked.source.sha) == (str(NOTHING), question.source.sha)
            and wanted <= {one.name for one in asked.measurements}
            and asked.settings.windows == question.settings.windows
        )
        if row.status != "ok":
            raise IsolatedError(f"The baseline cannot be measured: {row.error}", row.status)
        return row

    def _score(self, row: Row, question: Question, bench: Isolated) -> None:
        """Everything that is read from the variant and from one loaded session, and the verdict of the gate."""
        name = str(question.recipe)
        bench.call("build", progress=self.show(f"{name}: build"))
        row.fill(bench.call("measure", names=question.of("variant")))
        for need in ("logits", "session"):
            if names := question.of(need):
                row.fill(bench.call("measure", names=names, progress=self.show(f"{name}: {need}")))
        if question.of("logits") or question.of("session"):
            row.fill(bench.call("engine"))
        if question.gated:
            self._gate(row, question, bench)

    def _gate(self, row: Row, question: Question, bench: Isolated) -> None:
        """Compare an engine with PyTorch on the same weights; an engine's own quantizer has no such twin."""
        if not question.has_twin:
            row.parity, row.parity_detail = OWN_WEIGHTS
            return
        if "quality" not in question.parts:
            row.parity, row.parity_detail = ledger.verdict(row)
        if row.parity is None and question.parts.intersection(("quality", "speed")):
            try:
                row.fill(bench.call("gate", progress=self.show(f"{question.recipe}: parity")))
            except IsolatedError as error:
                row.parity, row.parity_detail = "failed", f"PyTorch could not be asked: {error}"

    def _time(self, row: Row, question: Question) -> None:
        """Latency in turns with the baseline, and what is left to read from the process afterwards.

        A baseline that dies takes no row with it: it is started again, and the row is timed anew.
        """
        for attempt in (1, 2):
            try:
                with timing_lock(), _Timed(question) as mine:
                    theirs = self._running(question) if question.beside else None
                    row.fill(mine.opened)
                    for name in question.of("turns"):
                        run = MEASUREMENTS[name].run
                        show = self.show(f"{question.recipe}: speed")
                        row.fill(run(mine, theirs, Asked(**question.asked()), show))
                    row.fill(mine.process.call("measure", names=question.of("process")))
                return
            except IsolatedError as error:
                died = self.beside is not None and self.beside.failed
                if not died:
                    raise
                self.beside.close()
                self.beside = None
                if attempt == 2:
                    raise IsolatedError(
                        f"The baseline in turns with it died twice: {error}", error.status
                    ) from None

    def _serve(self, row: Row, question: Question, baseline: Row | None) -> None:
        """Requests that the whole deployment answers, in a process of its own, while nothing else is timed here."""
        with timing_lock(), _bench(question, baseline) as bench:
            bench.call("build", progress=self.show(f"{question.recipe}: build"))
            show = self.show(f"{question.recipe}: requests")
            row.fill(bench.call("measure", names=question.of("deployment"), progress=show))
            row.fill(bench.call("serving"))

    def _running(self, question: Question) -> _Timed:
        """The loaded baseline; started where it is not."""
        if self.beside is None:
            twin = Question(NOTHING, question.source, question.settings, question.measurements)
            self.beside = _Timed(twin)
        self.beside.start()
        return self.beside


class _Timed:
    """A process that is timed: a Runner, which notes whether it was this side that failed."""

    def __init__(self, question: Question) -> None:
        self.question, self.failed = question, False
        self.process = _bench(question)
        self.opened: dict[str, Any] | None = None

    def start(self) -> None:
        """Load and warm up, once."""
        if self.opened is None:
            self._call("build")
            self.opened = self._call("open")
            self._call("warm_up")

    def prefill(self) -> float:
        return self._call("prefill")

    def decode(self, tokens: int) -> list[float]:
        return self._call("decode", tokens=tokens)

    def _call(self, method: str, **arguments: Any) -> Any:
        try:
            return self.process.call(method, **arguments)
        except IsolatedError:
            self.failed = True
            raise

    def close(self) -> None:
        self.process.close()

    def __enter__(self) -> _Timed:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _bench(question: Question, baseline: Row | None = None, recipe: str | None = None) -> Isolated:
    return Isolated(
        "edgelab.lab.bench:Bench",
        question.settings.threads,
        question.settings.timeout_s,
        recipe=recipe or str(question.recipe),
        model=question.settings.model,
        seed=question.seed,
        asked=question.asked(baseline),
    )


def _bar(what: str) -> Progress:
    """A progress callback that draws one bar and takes it away when it is full."""
    bar = tqdm(total=1, desc=what, leave=False)

    def advance(done: int, total: int) -> None:
        if (bar.n, bar.total) != (done, total):
            bar.total, bar.n = total, done
            bar.refresh()
        if done >= total:
            bar.close()

    return advance
