"""One deployment of edge and cloud that is asked live: who answers, when who is at work, and the cloud unplugged."""

from __future__ import annotations

import html
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import ipywidgets

from edgelab.errors import EdgeLabError
from edgelab.plots.hybrid import time_line
from edgelab.reference import EMBEDDED
from edgelab.widgets import WIDE, Picture

if TYPE_CHECKING:
    from edgelab.deployments.hybrid.answering import Answer
    from edgelab.lab.requests import Running

log = logging.getLogger(__name__)

PROMPT = "The capital of France is the city of"
SHOWN = 4  # requests whose times are drawn
IDLE_S = 600.0  # without a request, after which a deployment ends


class _Closing(ipywidgets.VBox):
    """A box that calls `ended` when it is closed."""

    def __init__(self, children: Sequence[ipywidgets.Widget], ended: Callable[[], None]) -> None:
        super().__init__(children)
        self._ended = ended

    def close(self) -> None:
        """End what runs behind the controls, and take them out of the page."""
        if hasattr(self, "_ended"):  # ipywidgets closes a box that could not be made, too
            self._ended()
        super().close()


def live_request(
    recipe: str = "prune.layers:drop=13/14/15 @ cascade:cloud=(none),link=lte",
    tokens: int = 16,
    model: str = EMBEDDED,
    idle_s: float = IDLE_S,
) -> ipywidgets.VBox:
    """Ask a deployment of edge and cloud, see who answers and when who was at work, and unplug the cloud.

    The first question starts edge, cloud and link, which stay until Stop, until the widget is closed, or until nothing
    was asked for idle_s seconds. tokens: of an answer, at most.
    """
    prompt = ipywidgets.Text(value=PROMPT, description="Prompt", **WIDE)
    ask = ipywidgets.Button(description="Ask", button_style="primary")
    stop = ipywidgets.Button(description="Stop", disabled=True)
    unplugged = ipywidgets.ToggleButton(description="Unplug the cloud", button_style="danger", icon="plug")
    said, text, times = ipywidgets.HTML(), ipywidgets.HTML(), Picture(720)
    asker = _Asker(recipe, model, tokens, idle_s, ask, stop, unplugged, said, text, times)
    ask.on_click(lambda _: asker.ask(prompt.value))
    stop.on_click(lambda _: asker.stop())
    unplugged.observe(lambda change: asker.plug(change["new"]), "value")
    return _Closing([prompt, ipywidgets.HBox([ask, stop, unplugged]), said, text, times], asker.stop)


class _Asker:
    """What the buttons do. One thread starts the deployment, answers one prompt after the other, and ends it."""

    def __init__(
        self,
        recipe: str,
        model: str,
        tokens: int,
        idle_s: float,
        button: ipywidgets.Button,
        stop_button: ipywidgets.Button,
        unplugged: ipywidgets.ToggleButton,
        said: ipywidgets.HTML,
        text: ipywidgets.HTML,
        times: Picture,
    ) -> None:
        self.recipe, self.model, self.tokens, self.idle_s = recipe, model, tokens, idle_s
        self.button, self.stop_button, self.unplugged = button, stop_button, unplugged
        self.said, self.text, self.times = said, text, times
        self.thread: threading.Thread | None = None
        self.found: Running | None = None
        self.off = threading.Event()
        self.asked = 0
        self.spans: dict[str, Sequence[tuple[str, float, float]]] = {}

    def ask(self, prompt: str) -> None:
        """Hand a prompt to the thread, which is started where there is none."""
        if self.button.disabled or not prompt.strip():
            return
        self.button.disabled, self.stop_button.disabled = True, False
        if self.thread is None:
            self.said.value = "Starting …"
            from edgelab.measure.isolation import Stop  # as `lab`, it imports what saved rows do without

            self.off, self.prompts, self.process = threading.Event(), queue.Queue(), Stop()
            self.thread = threading.Thread(target=self._run, daemon=True)
            self.thread.start()
        self.prompts.put(prompt)

    def stop(self) -> None:
        """End the deployment, whatever it is doing; the thread says when it has ended."""
        if self.thread is None or self.off.is_set():
            return
        self.stop_button.disabled = self.button.disabled = True
        self.said.value = "Stopping …"
        self.off.set()
        self.process()
        if (found := self.found) is not None:
            found.hang_up()
        self.prompts.put(None)

    def plug(self, unplugged: bool) -> None:
        """Unplug the cloud of what runs, or plug it in. Before the start it is only noted."""
        self.unplugged.description = "Plug the cloud in" if unplugged else "Unplug the cloud"
        if self.found is not None and not self.off.is_set():
            (self.found.unplug if unplugged else self.found.plug_in)()

    def _run(self) -> None:
        """In the thread."""
        from edgelab.measure.isolation import Stopped

        try:
            with self.process:
                self._serve()
            ended = "Stopped." if self.off.is_set() else f"Nothing was asked for {self.idle_s:,.0f} s."
            ended = f"{ended} Edge, cloud and link have ended; the next question starts them again."
        except Stopped:
            ended = "Stopped. Edge, cloud and link have ended; the next question starts them again."
        except EdgeLabError as error:
            ended = str(error)
        except Exception as error:
            log.exception("a live request")
            ended = f"{type(error).__name__}: {error}"
        self.found = self.thread = None
        self.said.value = html.escape(ended)
        self.button.disabled, self.stop_button.disabled = False, True

    def _serve(self) -> None:
        from edgelab.lab.requests import running

        with running(
            self.recipe, model=self.model, tokens=self.tokens, say=self._say, called_off=self.off.is_set
        ) as found:
            self.found = found
            try:
                self._answer_all(found)
            finally:  # what ends is not unplugged any more
                self.found = None

    def _answer_all(self, found: Running) -> None:
        if self.unplugged.value:
            found.unplug()
        while (prompt := self._next()) is not None:
            limit = f" The cloud is given up after {found.deadline_s:g} s." if found.remote else ""
            self._say(f"Answering …{limit}")
            answer = found.answer(prompt)
            if self.off.is_set():  # its time says when it was stopped
                return
            self._show(prompt, answer)
            self.button.disabled = False

    def _next(self) -> str | None:
        try:
            return self.prompts.get(timeout=self.idle_s)
        except queue.Empty:
            self.button.disabled = True
            return None

    def _say(self, text: str) -> None:
        if not self.off.is_set():
            self.said.value = html.escape(text)

    def _show(self, prompt: str, answer: Answer) -> None:
        self.asked += 1
        self.text.value = answer_words(prompt, answer)
        self.spans[f"{self.asked}: {answer.by}"] = answer.spans
        for name in list(self.spans)[:-SHOWN]:
            del self.spans[name]
        self.times.draw(time_line(self.spans, "Who was at work when"))
        self._say(f"Ready: {self.recipe}.")


def answer_words(prompt: str, answer: Answer) -> str:
    """HTML: prompt and answer, who answered in how many milliseconds, what travelled and what went wrong.

    `data-by` and `data-ms` hold who and how long.
    """
    who = {"edge": "The edge answered", "cloud": "The cloud answered", "nobody": "Nobody answered"}[answer.by]
    if answer.by == "edge" and answer.wanted_cloud:
        who = "The edge answered for want of the cloud"
    travelled = f", {answer.sent_bytes:,} bytes sent and {answer.received_bytes:,} received"
    drafts = f", {answer.accepted} of {answer.drafted} drafted tokens accepted" if answer.drafted else ""
    sure = "".join(f", {name} {value:.2f}" for name, value in answer.scores.items() if name == "margin")
    return (
        f'<div class="edgelab-answer" data-by="{answer.by}" data-ms="{1e3 * answer.seconds:.1f}">'
        f"<p>{html.escape(prompt)}<b>{html.escape(answer.text)}</b></p>"
        f"<p>{who} in {1e3 * answer.seconds:,.0f} ms{travelled if answer.sent_bytes else ''}{drafts}{sure}. "
        f"{html.escape(answer.said)}</p></div>"
    )
