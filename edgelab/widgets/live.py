"""Measuring live: a button that starts it, what it is doing and for how long, and a button that stops it.

A thread measures, in processes of their own as everywhere, so that the kernel can hear the other button. JupyterLab
with the shipped settings handles widget messages one after the other: a callback that measured would block them all.
"""

from __future__ import annotations

import html
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import ipywidgets

from edgelab import assets, recipes
from edgelab.errors import EdgeLabError
from edgelab.ledger import Row
from edgelab.reference import EMBEDDED

if TYPE_CHECKING:
    from edgelab.lab.plan import Step
    from edgelab.measure.isolation import Stop

log = logging.getLogger(__name__)

TICK_S = 0.5  # how often the time is written
UNSURE = 0.95  # of a step that takes longer than was estimated, this much counts as done
PARTS = {
    "build": "making the weights",
    "logits": "reading the text",
    "session": "reading the text",
    "parity": "comparing with PyTorch",
    "speed": "timing",
}


class Live:
    """Buttons and a line of text, in `box`, that measure what `asked` says and hand the rows to `done`.

    asked: the recipes, when the button is pressed. done: called with the rows that were measured, after a stop or an
    error with those before it. locked: controls that cannot be used meanwhile. on_tick: called twice a second while it
    measures. settings: as of `edgelab.measure`.
    """

    def __init__(
        self,
        asked: Callable[[], list[str]],
        done: Callable[[list[Row]], None],
        locked: Sequence[ipywidgets.Widget] = (),
        on_tick: Callable[[], None] | None = None,
        **settings: object,
    ) -> None:
        self.asked, self.done, self.locked, self.settings = asked, done, locked, settings
        self.on_tick = on_tick
        self.start = ipywidgets.Button(description="Measure live", button_style="primary")
        self.stop = ipywidgets.Button(description="Stop", disabled=True)
        self.bar = ipywidgets.FloatProgress(max=1, layout={"visibility": "hidden", "width": "200px"})
        self.said = ipywidgets.HTML()
        self.box = ipywidgets.VBox([ipywidgets.HBox([self.start, self.stop, self.bar]), self.said])
        self.start.on_click(self._begin)
        self.stop.on_click(lambda _: self._stop())  # which is there while this button can be pressed

    def offer(self) -> None:
        """Say how long measuring would take, where that needs neither an import of the techniques nor a download."""
        embedded = self.settings.get("model", EMBEDDED) == EMBEDDED
        if not recipes.TECHNIQUES or (embedded and not all(assets.status().values())):
            return
        from edgelab import lab

        try:
            seconds = lab.estimate_s(self.asked(), interleave=False, **self.settings)
        except EdgeLabError as error:
            self.said.value = html.escape(str(error))
        else:
            self.said.value = f"Measuring it takes {about(seconds)}." if seconds else ""

    def _begin(self, _: ipywidgets.Button) -> None:
        from edgelab.measure.isolation import Stop  # this and `lab` import what saved rows do without

        if self.start.disabled:
            return
        for control in (self.start, *self.locked):
            control.disabled = True
        self._stop = Stop()
        self.stop.disabled, self.bar.value, self.said.value = False, 0, "Planning …"
        self.bar.layout.visibility = "visible"
        threading.Thread(target=self._measure, args=[self.asked(), self._stop], daemon=True).start()

    def _measure(self, texts: list[str], stop: Stop) -> None:
        """In the thread: measure, say how it ended, and let the controls be used again."""
        from edgelab.measure.isolation import Stopped

        rows: list[Row] = []
        try:
            with stop:
                said = self._go_on(texts, rows)
        except Stopped:
            said = f"Stopped. What had been measured is kept: {len(rows)} of {len(texts)} rows."
        except EdgeLabError as error:
            said = str(error)
        except Exception as error:
            log.exception("measuring live")
            said = f"{type(error).__name__}: {error}"
        try:
            self.done(rows)
            self.said.value = html.escape(said)
        finally:
            self.stop.disabled, self.bar.layout.visibility = True, "hidden"
            for control in (self.start, *self.locked):
                control.disabled = False

    def _go_on(self, texts: list[str], rows: list[Row]) -> str:
        """Do what there is to do, and add rows as they come. Returns what went wrong with one, or nothing."""
        from edgelab import lab

        failed = ""
        steps = lab.planned(texts, interleave=False, **self.settings)
        with _Told(steps, self._write) as told:
            for step, row in lab.follow(steps, told.show):
                told.next(step)
                if row is not None and row.status != "ok":
                    failed = f"{row.recipe}: {row.error}"
                elif step.place is not None:
                    rows.append(row)
        return failed

    def _write(self, text: str, share: float) -> None:
        self.said.value, self.bar.value = html.escape(text), share
        if self.on_tick is not None:
            self.on_tick()


class _Told:
    """How far a plan has come. While it is entered, a clock writes a line of text and a share from 0 to 1."""

    def __init__(self, steps: list[Step], write: Callable[[str, float], None]) -> None:
        self.to_do = [step for step in steps if not step.is_known]
        self.seconds = [max(step.estimate_s, 1) for step in self.to_do]
        self.write = write
        self.done, self.part = 0, ""
        self.started = self.step_started = time.monotonic()
        self._over = threading.Event()
        self._clock = threading.Thread(target=self._tick, daemon=True)

    def show(self, name: str) -> Callable[[int, int], None]:
        """What `lab.follow` asks for each part of a step: a function that is told how much of it is done."""
        recipe, _, part = name.rpartition(": ")
        doing = f"{recipe}: {PARTS.get(part, part)}"
        self.part = doing

        def advance(done: int, total: int) -> None:
            self.part = f"{doing}, {done / total:.0%}" if total else doing

        return advance

    def next(self, step: Step) -> None:
        """One step is done."""
        if any(step is one for one in self.to_do):
            self.done, self.step_started = self.done + 1, time.monotonic()

    def _tick(self) -> None:
        while True:
            if self.done < len(self.to_do):
                self.write(*self._state(time.monotonic()))
            if self._over.wait(TICK_S):
                return

    def _state(self, now: float) -> tuple[str, float]:
        gone = min(now - self.step_started, UNSURE * self.seconds[self.done])
        finished, whole = sum(self.seconds[: self.done]) + gone, sum(self.seconds)
        text = f"Step {self.done + 1} of {len(self.to_do)}" + (f", {self.part}" if self.part else "")
        return (
            f"{text}. {now - self.started:.0f} s so far, {about(whole - finished)} to go.",
            finished / whole,
        )

    def __enter__(self) -> _Told:
        self._clock.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._clock.join()


def about(seconds: float) -> str:
    """A time as an estimate: in words that claim no more than is known."""
    if seconds < 8:
        return "a few seconds"
    if seconds < 90:
        return f"about {5 * round(seconds / 5)} s"
    return f"about {seconds / 60:.0f} min" if seconds < 5400 else f"about {seconds / 3600:.0f} h"
