"""Techniques, deployments and measurements from elsewhere: Python files that are imported after edgelab's own.

EDGELAB_PLUGINS names files and folders, separated like those of PATH; by default the folder `plugins` below `home()`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
from pathlib import Path

from edgelab import assets
from edgelab.errors import EdgeLabError


class PluginError(EdgeLabError):
    """A file of EDGELAB_PLUGINS that is not there, or cannot be imported."""


def files() -> list[Path]:
    """The files, in the order in which they are imported. Raises PluginError for a named place that is not there."""
    if named := os.environ.get("EDGELAB_PLUGINS"):
        places = [Path(place).expanduser() for place in named.split(os.pathsep) if place]
    else:
        places = [assets.home() / "plugins"]
    found: list[Path] = []
    for place in places:
        if named and not place.exists():
            raise PluginError(f"EDGELAB_PLUGINS names {place}, which does not exist.")
        found += [place] if place.is_file() else sorted(place.glob("*.py"))
    return list(dict.fromkeys(path.resolve() for path in found))


def load() -> None:
    """Import every file that this process has not imported yet. Raises PluginError naming the file that fails."""
    for path in files():
        name = f"edgelab_plugin_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
        if name in sys.modules:
            continue
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None:
            raise PluginError(f"EDGELAB_PLUGINS names {path}, which is no Python file.")
        sys.modules[name] = module = importlib.util.module_from_spec(spec)  # dataclasses look for it there
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[name]
            raise PluginError(f"{path} cannot be imported ({type(error).__name__}: {error}).") from error
