"""edgelab: one small language model through every technique for the edge, measured side by side."""

import importlib
import sys
import types
from typing import Any

__version__ = "0.1.0"

# Public name -> module that holds it; None for a module itself. Imported on use: `edgelab --help` needs no torch.
_PUBLIC = {
    "load": "edgelab.reference",
    "Reference": "edgelab.reference",
    "compare": "edgelab.lab",
    "sample": "edgelab.lab",
    "export": "edgelab.lab",
    "profile": "edgelab.lab",
    "parse": "edgelab.recipes",
    "predict": "edgelab.exercises",
    "machine": "edgelab.doctor",
    "EdgeLabError": "edgelab.errors",
    "corpora": None,
    "devices": None,
    "exercises": None,
    "ledger": None,
    "plots": None,
    "rows": None,
    "widgets": None,
}
__all__ = sorted([*_PUBLIC, "measure"])


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'edgelab' has no attribute '{name}'")
    module = importlib.import_module(_PUBLIC[name] or f"edgelab.{name}")
    return getattr(module, name) if _PUBLIC[name] else module


class _Package(types.ModuleType):
    """`edgelab.measure` is the function; importing the subpackage of that name does not hide it."""

    @property
    def measure(self) -> Any:
        return importlib.import_module("edgelab.lab").measure

    @measure.setter
    def measure(self, subpackage: types.ModuleType) -> None:
        """What the import system sets is found in sys.modules, too."""


sys.modules[__name__].__class__ = _Package
