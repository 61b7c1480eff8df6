"""A fleet to edit, and its plan at once: who runs what, who works when, and what other planners would do."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import replace
from functools import cache

import ipywidgets

from edgelab.deployments.partition import Partition, fleet
from edgelab.deployments.partition.formats import FORMATS
from edgelab.deployments.partition.planners import explained
from edgelab.deployments.partition.planning import Planned, against, plan_of, profile_for
from edgelab.deployments.partition.profile import Profile, Timings, from_shape
from edgelab.deployments.partition.simulator import chain, simulate
from edgelab.devices.shapes import models
from edgelab.errors import EdgeLabError
from edgelab.network import Link
from edgelab.plots.partition import PLANNER_NAMES, gantt
from edgelab.widgets import WIDE, Picture

EFFICIENCY = 0.6  # of memory bandwidth, where nothing is timed
RATES = (1, 2, 5, 10, 20, 50)  # Mbps between source and cloud
BITS = (32, 16, 8, 4)
TOKENS = 4  # of each request in the chart


def fleet_editor(timings: Timings | None = None, name: str = "edgeshard") -> ipywidgets.VBox:
    """Edit a fleet; the plan, its chart and the other planners answer at once.

    timings: of the model that was timed here, as `edgelab.profile` gives them; others are counted from their shapes.
    name: the fleet to begin with.
    """
    shapes = models()
    own = [] if timings is None else [_timed(timings)]
    model = ipywidgets.Dropdown(
        options=[*own, *shapes], value=(own or ["Llama-2-7B"])[0], description="Model", **WIDE
    )
    bits = ipywidgets.Dropdown(options=[(f"{one} bits", one) for one in BITS], description="Weights", **WIDE)
    which = ipywidgets.Dropdown(options=list(fleet.fleets()), value=name, description="Fleet", **WIDE)
    members = ipywidgets.SelectMultiple(description="Devices", rows=6, **WIDE)
    room = ipywidgets.IntSlider(min=10, max=100, step=5, value=100, description="Memory (%)", **WIDE)
    rates = [("as in the fleet", 0), *((f"{rate}", rate) for rate in RATES)]
    link = ipywidgets.SelectionSlider(options=rates, value=0, description="Cloud (Mbps)", **WIDE)
    objective = ipywidgets.ToggleButtons(
        options=["latency", "throughput", "energy", "slow_bytes"], description="Least"
    )
    wire = ipywidgets.ToggleButtons(options=FORMATS, description="Wire")
    requests = ipywidgets.IntSlider(min=1, max=6, value=2, description="In flight", **WIDE)
    answer, picture = ipywidgets.HTML(), Picture(900)

    def offer(change: Mapping | None = None) -> None:
        names = fleet.load(which.value).names
        members.options, members.value = names, names

    def redraw(change: Mapping | None = None) -> None:
        bits.disabled = model.value in own
        if not members.value:
            answer.value, picture.value = "Choose at least one device.", ""
            return
        try:
            edited = _edited(which.value, members.value, room.value / 100, link.value)
            settings = Partition(
                fleet=which.value, objective=objective.value, wire=wire.value, requests=requests.value
            )
            profile: Profile = (
                profile_for(settings, timings, edited)
                if model.value in own
                else from_shape(shapes[model.value], edited, EFFICIENCY, bits=bits.value, requests=requests.value,
                                wire=wire.value)
            )  # fmt: skip
            found = plan_of(settings, profile, edited)
        except EdgeLabError as error:
            answer.value, picture.value = html.escape(str(error)), ""
            return
        answer.value = plan_words(found)
        line = chain(found.problem, found.plan.placement)
        picture.draw(
            gantt(simulate(line, requests.value, TOKENS), f"{TOKENS} tokens of each request, one by one")
        )

    offer()
    which.observe(offer, "value")
    for control in (model, bits, members, room, link, objective, wire, requests):
        control.observe(redraw, "value")
    redraw()
    left = ipywidgets.VBox([model, bits, which, members])
    right = ipywidgets.VBox([room, link, requests, objective, wire])
    return ipywidgets.VBox([ipywidgets.HBox([left, right]), answer, picture])


def plan_words(found: Planned) -> str:
    """HTML: the plan in sentences, and a table of what other planners would do. `data-ms` holds its latency."""
    predicted = found.predicted
    said = "".join(
        f"<li>{html.escape(one)}</li>"
        for one in explained(found.problem, found.plan, found.profile.names)[:8]
    )
    rows = "".join(
        f"<tr><td>{PLANNER_NAMES[row['planner']]}</td>"
        + (
            f"<td>{row['devices']}</td><td>{row['ms']:,.1f}</td><td>{row['tok_s']:,.1f}</td></tr>"
            if row["devices"]
            else f"<td colspan='3'>{html.escape(row['said'])}</td></tr>"
        )
        for row in against(found)
    )
    return (
        f'<div class="edgelab-plan" data-ms="{predicted.tpot_ms:.3f}"><b>{predicted.tpot_ms:,.1f} ms per token</b>, '
        f"{predicted.tok_s:,.1f} tokens/s with {predicted.requests} in flight.<ul>{said}</ul>"
        "<table><tr><th>planner</th><th>devices</th><th>ms per token</th><th>tokens/s</th></tr>"
        f"{rows}</table></div>"
    )


def _timed(timings: Timings) -> str:
    return f"{timings.model}, timed here"


@cache
def _edited(name: str, members: tuple[str, ...], share: float, mbps: float) -> fleet.Fleet:
    """A fleet with some of its devices, a share of their memory, and another link between source and cloud.

    mbps: of that link, 0 to leave it. The cloud is the device of the widest memory, or the last one.
    """
    found = fleet.load(name).only(members)
    found = replace(found, members=tuple(replace(one, room_gb=share * one.room_gb) for one in found.members))
    far = max(
        range(len(members)), key=lambda place: (found.members[place].device.memory_bandwidth_gb_s or 0, place)
    )
    if far == 0 or not mbps:
        return found
    delay_ms = 2e3 * float(found.delay[0, far])
    return found.linked(members[0], members[far], Link("edited", mbps, mbps, delay_ms))
