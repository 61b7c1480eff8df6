"""Where a row comes from: machine, system, versions and time."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import tomllib
from collections.abc import Iterable
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path

import psutil

DECIDING = ("edgelab", "torch", "transformers", "numpy")  # packages whose versions decide every number


def provenance(threads: int, packages: Iterable[str] = ()) -> dict[str, object]:
    """Machine, versions (those of an engine's `packages` too) and time.

    `host` is a hash, so that rows can be shared.
    """
    return machine() | {
        "threads": threads,
        "versions": versions(packages),
        "git_sha": _git_sha(),
        "started_at": datetime.now(UTC).isoformat(timespec="milliseconds"),
    }


@cache
def machine() -> dict[str, object]:
    """What of a row does not change while a process lives."""
    return {
        "host": hashlib.sha256(f"{platform.node()} {_cpu()}".encode()).hexdigest()[:10],
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "ram_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "os": f"{platform.system()} {platform.release().partition('-')[0]} {platform.machine()}",
        "python": platform.python_version(),
    }


def versions(packages: Iterable[str] = ()) -> str:
    """Versions of what decides the numbers, an engine's `packages` among it, as JSON text; null: not installed."""
    return json.dumps({name: version(name) for name in (*DECIDING, *packages)})


@cache
def version(package: str) -> str | None:
    """The installed version of a package; None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        found = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
        if found:
            return found
    return platform.processor() or platform.machine()


@cache
def _git_sha() -> str | None:
    """The commit of the checkout that holds the package, if it is one of this project; None for an installed one."""
    top = Path(__file__).resolve().parent.parent.parent
    command = ["git", "-C", str(top), "rev-parse", "--short=12", "HEAD"]
    here = {
        name: value for name, value in os.environ.items() if not name.startswith("GIT_")
    }  # a hook sets GIT_DIR
    try:
        project = tomllib.loads((top / "pyproject.toml").read_text(encoding="utf-8"))["project"]["name"]
        if project != "edgelab" or not (top / ".git").exists():
            return None
        return subprocess.run(command, capture_output=True, text=True, check=True, env=here).stdout.strip()
    except (OSError, ValueError, KeyError, subprocess.CalledProcessError):
        return None
