"""A partition that runs live: tokens appear, a device can be killed, and what going on without it costs is said."""

from __future__ import annotations

import html
import logging
import threading

import ipywidgets

from edgelab.deployments.partition.problem import stages
from edgelab.errors import EdgeLabError
from edgelab.reference import EMBEDDED
from edgelab.widgets import WIDE

log = logging.getLogger(__name__)

PROMPT = "Once upon a time there was a little robot who"


def live_partition(
    recipe: str = "none @ partition:fleet=two_here,use=cloud", tokens: int = 60, model: str = EMBEDDED
) -> ipywidgets.VBox:
    """Write with a recipe on its fleet, every device a process of this machine, and kill one while it writes."""
    prompt = ipywidgets.Text(value=PROMPT, description="Prompt", **WIDE)
    start = ipywidgets.Button(description="Write", button_style="primary")
    kill = ipywidgets.Button(description="Kill a device", button_style="danger", disabled=True)
    which = ipywidgets.Dropdown(options=[], description="Device", disabled=True, **WIDE)
    said, text = ipywidgets.HTML(), ipywidgets.HTML()
    writer = _Writer(recipe, model, tokens, said, text, which, kill)

    def begin(_: ipywidgets.Button) -> None:
        if start.disabled:
            return
        start.disabled = True
        threading.Thread(target=work, args=[prompt.value], daemon=True).start()

    def work(asked: str) -> None:
        try:
            writer.write(asked)
        except EdgeLabError as error:
            said.value = html.escape(str(error))
        except Exception as error:
            log.exception("a live partition")
            said.value = html.escape(f"{type(error).__name__}: {error}")
        finally:
            start.disabled, kill.disabled, which.disabled = False, True, True

    start.on_click(begin)
    kill.on_click(lambda _: writer.kill(which.value))
    return ipywidgets.VBox([prompt, ipywidgets.HBox([start, which, kill]), said, text])


class _Writer:
    """What the buttons do. All controls are given: a thread reads and sets them."""

    def __init__(
        self,
        recipe: str,
        model: str,
        tokens: int,
        said: ipywidgets.HTML,
        text: ipywidgets.HTML,
        which: ipywidgets.Dropdown,
        button: ipywidgets.Button,
    ) -> None:
        self.recipe, self.model, self.tokens = recipe, model, tokens
        self.said, self.text, self.which, self.button = said, text, which, button
        self.cluster = None

    def write(self, prompt: str) -> None:
        """Plan, start, write; the workers end with it."""
        from edgelab.lab.partitions import running

        self.said.value, self.text.value = (
            "Timing the parts, planning, starting a worker for each stage …",
            "",
        )
        with running(self.recipe, model=self.model) as found:
            self.cluster = found.session.running()
            self._offer()
            written, seconds = "", 0.0
            for _, piece, seconds in found.write([prompt], self.tokens):
                written += piece
                self.text.value = f"<p>{html.escape(prompt)}<b>{html.escape(written)}</b></p>"
                self._say(seconds)
            self._say(seconds, "Done. ")
            self.cluster = None

    def kill(self, device: str) -> None:
        """End a worker in mid-sentence, as a flat battery would."""
        if self.cluster is not None and device:
            self.button.disabled = True
            self.cluster.kill(device)

    def _offer(self) -> None:
        runs = stages(self.cluster.plan.placement)
        self.which.options = [self.cluster.problem.names[run.device] for run in runs if run.device != 0]
        self.which.value = next(iter(self.which.options), None)  # a new list chooses nothing by itself
        self.which.disabled = self.button.disabled = not self.which.options

    def _say(self, seconds: float, first: str = "") -> None:
        lost = "".join(
            f" {html.escape(one.device)} was lost: noticed in {one.detected_s:.2f} s, planned in {one.planning_s:.2f}, "
            f"loaded in {one.loading_s:.2f}, read again in {one.reading_s:.2f}."
            for one in self.cluster.recoveries
        )
        self.said.value = f"{first}{html.escape(self.cluster.describe())}, {seconds:.1f} s.{lost}"
