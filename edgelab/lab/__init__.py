"""From recipes to rows: question, plan, and the road that goes through them."""

from edgelab.lab.exporting import Exported, ExportError, export
from edgelab.lab.question import MeasureError, Question, Settings
from edgelab.lab.road import DEFAULT_SET, compare, estimate_s, follow, planned, profile, sample, stream
from edgelab.lab.road import run as measure

__all__ = [
    "DEFAULT_SET",
    "ExportError",
    "Exported",
    "MeasureError",
    "Question",
    "Settings",
    "compare",
    "estimate_s",
    "export",
    "follow",
    "measure",
    "planned",
    "profile",
    "sample",
    "stream",
]
