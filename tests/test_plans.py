"""Plans by recipe: what every format of the wire costs, in bytes, milliseconds, and quality where it was measured."""

import dataclasses
import math

from edgelab import ledger
from edgelab.lab.plans import formats, plan_from_shape
from edgelab.ledger import Row
from edgelab.reference import resolve

RECIPE = "none @ partition:fleet=edgeshard,use=cloud"


def measured(recipe: str, sha: str, delta_nll: float) -> None:
    row = Row(recipe=recipe, model_sha=sha, runtime="partition", delta_nll=delta_nll)
    row.delta_nll_low, row.delta_nll_high = delta_nll - 0.001, delta_nll + 0.001
    ledger.add(row)


def test_formats_of_the_wire_with_what_was_measured_of_them(tiny):
    sha = resolve(str(tiny)).sha
    measured("none @ partition:fleet=two_here,wire=int8,cut=2", sha, 0.25)
    measured("none @ partition:fleet=two_here,wire=int8,cut=3", sha, 0.5)  # the newest
    measured("quantize.rtn:bits=4 @ partition:wire=float16", sha, 0.75)  # other weights
    measured("none @ partition:wire=float16", "another model", 1.0)
    found = formats(plan_from_shape(RECIPE, "Llama-2-7B"), RECIPE, str(tiny))
    by_wire = {one["wire"]: one for one in found}
    assert by_wire["float32"]["delta_nll"] == 0
    assert by_wire["int8"]["delta_nll"] == 0.5
    assert by_wire["int8"]["delta_nll_low"] == 0.499
    assert math.isnan(by_wire["float16"]["delta_nll"])


def test_each_format_has_a_plan_of_its_own():
    """Fewer bytes are never slower, and hop by hop a state of 4,096 numbers takes what its format says."""
    found = plan_from_shape(RECIPE, "Llama-2-7B")
    own = {one["wire"]: one for one in formats(found, RECIPE)}
    assert own["float32"]["ms"] == found.predicted.tpot_ms
    assert own["float32"]["ms"] >= own["float16"]["ms"] >= own["int8"]["ms"] >= own["int4"]["ms"]
    hops = own["float32"]["said"].count(">")
    assert own["float32"]["bytes"] == hops * 16_384 + 4


def test_a_format_that_cannot_hold_the_states_says_why():
    found = plan_from_shape(RECIPE, "Llama-2-7B")
    odd = dataclasses.replace(found, profile=dataclasses.replace(found.profile, hidden_size=4095))
    by_wire = {one["wire"]: one for one in formats(odd, RECIPE)}
    assert math.isnan(by_wire["int4"]["bytes"]) and "4095 is odd" in by_wire["int4"]["said"]
    assert by_wire["int8"]["bytes"] % (4095 + 4) == 4
