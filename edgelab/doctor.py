"""What `edgelab doctor` looks at: machine, versions, assets, extras and the setting that widgets need."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import psutil

from edgelab import assets, ledger
from edgelab.errors import EdgeLabError, to_install

EXTRAS = {  # extra -> a package that stands for it; those of engines are asked of the runtimes
    "cluster": "ray",
    "search": "optuna",
    "hybrid": "fastapi",
    "test": "pytest",
}


def machine() -> str:
    """The machine that this runs on, in one line: processor, cores, memory and what of it is free, system."""
    known, memory = ledger.machine(), psutil.virtual_memory()
    cores = psutil.cpu_count(logical=False) or os.cpu_count()
    sizes = f"{memory.total / 1e9:.0f} GB of memory, {memory.available / 1e9:.0f} GB free"
    return f"{known['cpu']}, {cores} cores, {sizes}, {known['os']}"


def checks() -> Iterator[tuple[str, str, str, str]]:
    """(check, "ok" | "note" | "broken", finding, the one command that mends it); broken: the main job cannot run."""
    yield "machine", "ok", machine(), ""
    if psutil.virtual_memory().available < 3e9:
        yield "memory", "note", "less than 3 GB are free; close other programs before measuring", ""
    for package in (
        "torch",
        "transformers",
        "datasets",
        "evaluate",
        "safetensors",
        "gguf",
        "matplotlib",
        "jupyterlab",
    ):
        if found := ledger.version(package):
            yield package, "ok", found, ""
        else:
            yield package, "broken", "not installed", f"pip install {package}"
    if importlib.util.find_spec("torch"):
        import torch

        yield "threads", "ok", f"torch uses {torch.get_num_threads()}", ""
        missing = [n for n in ("_weight_int8pack_mm", "_weight_int4pack_mm_for_cpu") if not hasattr(torch, n)]
        if missing:
            yield "kernels", "broken", f"this torch has no {missing[0]}", "pip install 'torch>=2.13,<2.14'"
        yield from _engines()
    try:
        absent = [name for name, whole in assets.status().items() if not whole]
    except EdgeLabError as error:
        absent = [str(error)]
    state = "note" if absent else "ok"
    yield (
        "assets",
        state,
        f"missing or damaged: {', '.join(absent)}" if absent else f"whole, in {assets.home()}",
        ("edgelab fetch" if absent else ""),
    )
    place = next(folder for folder in (assets.home(), *assets.home().parents) if folder.exists())
    if not os.access(place, os.W_OK):
        yield "cache", "broken", f"{place} cannot be written", "export EDGELAB_HOME=$PWD/.edgelab"
    for extra, package in EXTRAS.items():
        if importlib.util.find_spec(package) is None:
            yield f"extra {extra}", "note", "not installed", to_install(extra)
    yield _subshell_check()


def absent(deployment: str) -> list[str]:
    """The packages of a deployment that are not installed."""
    from edgelab.recipes import deployments

    return [package for package in deployments()[deployment].packages if ledger.version(package) is None]


def _engines() -> Iterator[tuple[str, str, str, str]]:
    from edgelab.recipes import deployments

    for name, kind in deployments().items():
        if missing := absent(name):
            mend = to_install(kind.extra) if kind.extra else f"pip install {' '.join(missing)}"
            yield f"runtime {name}", "note", f"{', '.join(missing)} not installed", mend


def _subshell_check() -> tuple[str, str, str, str]:
    """Widget callbacks on a second thread lose plots: the setting that we ship turns that off, unless overridden."""
    from jupyterlab.commands import get_app_dir, get_user_settings_dir

    name = "kernels-settings.jupyterlab-settings"
    own = Path(get_user_settings_dir()) / "@jupyterlab" / "apputils-extension" / name
    places = [
        Path(get_app_dir()) / "settings" / "overrides.json",
        *sorted((Path(get_app_dir()) / "settings" / "overrides.d").glob("*.json")),
    ]
    shipped = [place.read_text() for place in places if place.exists()]
    text = own.read_text() if own.exists() and "commsOverSubshells" in own.read_text() else "".join(shipped)
    if "commsOverSubshells" in text and "disabled" in text.partition("commsOverSubshells")[2][:40]:
        return "widgets", "ok", "JupyterLab handles widget messages on the main thread", ""
    return (
        "widgets",
        "note",
        "JupyterLab may handle widget messages on a second thread, which loses plots",
        "make setup" if not own.exists() else f"rm '{own}'",
    )
