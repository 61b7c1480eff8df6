"""Runtimes: what executes a variant. One file per engine, named by the deployments of `recipes`.

PyTorch runs a variant as it is. An engine runs what its `export` makes of it: a file in the engine's own format, with
the integers that our techniques chose, written once into the variant's folder and found there afterwards. Either way
comes out a session (`session.py`).
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from edgelab import assets, recipes
from edgelab.errors import EdgeLabError, to_install
from edgelab.keys import key
from edgelab.storage import cache, variants

if TYPE_CHECKING:
    from edgelab.recipes import Deployment
    from edgelab.runtimes.session import Session


NOTE = "export.json"


class RuntimeRefused(EdgeLabError):
    """A variant that a runtime cannot run; the sentence says which one can, or what would be right."""


class EngineMissing(EdgeLabError):
    """An engine whose package is not installed."""

    def __init__(self, engine: str, extra: str) -> None:
        super().__init__(
            f"{engine} is not installed here; `{to_install(extra)}` in the project's folder installs it."
        )


@dataclass(frozen=True)
class Export:
    """What an engine loads: its folder, bytes of weights and of the files it reads, and the seconds it took to make."""

    folder: Path
    weights_bytes: int
    file_bytes: int
    seconds: float


def cannot_load(engine: str, folder: Path, reason: object, spare: tuple[str, ...] = ()) -> RuntimeRefused:
    """An export that an engine does not load, and what it says. Writing it anew helps only where files have changed."""
    said = _first_line(reason)
    if not (folder / NOTE).is_file():
        return RuntimeRefused(
            f"{engine} cannot load {folder} ({said}); if it was changed, remove it, and it is written anew."
        )
    if _is_as_written(folder, spare):
        return RuntimeRefused(f"{engine} cannot load what was exported of this model ({said}); use 'torch'.")
    return RuntimeRefused(
        f"{engine} cannot load {folder}, changed since it was written ({said}); remove it, and it is written anew."
    )


def _is_as_written(folder: Path, spare: tuple[str, ...]) -> bool:
    """Whether no file of an export is missing, or was changed after its note was written."""
    note = folder / NOTE
    try:
        noted, written = json.loads(note.read_text())["file_bytes"], note.stat().st_mtime_ns
    except (OSError, ValueError, KeyError):
        return False
    changed = any(file.stat().st_mtime_ns > written for file in folder.rglob("*"))
    return noted == _file_bytes(folder, spare) and not changed


def _file_bytes(folder: Path, spare: tuple[str, ...]) -> int:
    """Bytes of the files of an export that an engine reads."""
    return cache.tree_bytes(folder) - sum(
        (folder / name).stat().st_size for name in (NOTE, *spare) if (folder / name).is_file()
    )


def _first_line(reason: object) -> str:
    """The first line of an engine's message that says something."""
    lines = [line.strip(" .") for line in str(reason).splitlines()]
    return next(
        (line[:200] for line in lines if line and not line.startswith("Exception from")), repr(reason)
    )


def find(runtime: str) -> type[Session]:
    """The class of a runtime, whose module is imported now: an engine may be an optional dependency.

    Raises RuntimeRefused for a deployment that answers requests, by several engines.
    """
    kind = recipes.deployments()[runtime]
    if not hasattr(kind, "engine"):
        raise RuntimeRefused(
            f"@ {runtime} shares requests between edge and cloud and is no engine; give one, such as @ torch."
        )
    module, _, name = kind.engine.partition(":")
    return getattr(importlib.import_module(module), name)


def exported(where: Deployment | str, variant: Path) -> Export | None:
    """What an engine loads, made now unless it is there already; None for PyTorch, which loads the variant itself.

    where: a deployment, or its text. Each setting of one has an export of its own. A second process that wants the
    same export waits for the first one to finish it.
    Raises RuntimeRefused where the engine cannot run the variant, EngineMissing where it is not installed.
    """
    deployment, kind = _taken(where, variant)
    if kind.export is None:
        return None
    folder = _place(deployment, variant)
    if not (folder / NOTE).is_file():
        with cache.locked(variant):
            if not (folder / NOTE).is_file():
                with assets.staged(folder) as draft:
                    draft.mkdir()
                    _write(deployment, variant, draft)
        cache.trim(variant)
    return _noted(folder)


def exported_before(where: Deployment | str, variant: Path) -> Export | None:
    """What `exported` has made already; None where that is nothing, or has changed. Raises RuntimeRefused."""
    deployment, kind = _taken(where, variant)
    folder = _place(deployment, variant)
    return _noted(folder) if _is_as_written(folder, kind.spare) else None


def export_to(where: Deployment | str, variant: Path, folder: Path) -> Export:
    """Write what an engine loads into an empty folder of the caller's, and not into the cache. Raises as `exported`."""
    deployment, _ = _taken(where, variant)
    _write(deployment, variant, folder)
    return _noted(folder)


def _taken(where: Deployment | str, variant: Path) -> tuple[Deployment, type[Session]]:
    """A deployment and its runtime. Raises RuntimeRefused where that cannot run the variant."""
    deployment, kind = _both(where)
    if reason := kind.refusal(variants.read_description(variant)):
        raise RuntimeRefused(reason)
    return deployment, kind


def _place(deployment: Deployment, variant: Path) -> Path:
    """Where the export of a variant is kept."""
    settings = [key(repr(deployment))] if _settings(deployment) else []
    return variant / "exports" / "-".join([deployment.name, str(deployment.version), *settings])


def _noted(folder: Path) -> Export:
    return Export(folder, **json.loads((folder / NOTE).read_text()))


def _write(deployment: Deployment, variant: Path, folder: Path) -> None:
    """Write an export and its note into an empty folder."""
    kind = find(deployment.name)
    started = time.perf_counter()
    try:
        weights = kind.export(variant, folder, **_settings(deployment))
    except (EdgeLabError, OSError, MemoryError):
        raise
    except Exception as error:  # those of exporters have no common class
        raise RuntimeRefused(
            f"The export to {deployment.name} cannot hold this model ({_first_line(error)}); use 'torch'."
        ) from error
    spent = time.perf_counter() - started
    found = {"weights_bytes": weights, "file_bytes": _file_bytes(folder, kind.spare), "seconds": spent}
    (folder / NOTE).write_text(json.dumps(found))


def load(where: Deployment | str, variant: Path) -> Session:
    """Load a variant's folder as a deployment, or its text, says, on as many threads as torch uses."""
    deployment, kind = _both(where)
    found, settings = exported(deployment, variant), _settings(deployment)
    if found is None:
        return kind(variant, **settings)
    return kind(found.folder, torch.get_num_threads(), **settings)


def _both(where: Deployment | str) -> tuple[Deployment, type[Session]]:
    deployment = recipes.parse(f"none @ {where}").deployment if isinstance(where, str) else where
    return deployment, find(deployment.name)


def _settings(deployment: Deployment) -> dict[str, Deployment]:
    """What a session and its export are given besides: the deployment, where it has settings."""
    return {"deployment": deployment} if dataclasses.fields(deployment) else {}
