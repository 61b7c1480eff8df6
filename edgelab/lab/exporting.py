"""A recipe as a file that other programs open: GGUF, a folder of ONNX Runtime GenAI, a bundle of LiteRT-LM.

The file is what our engine of that kind runs, so what is measured `@ llamacpp` is what llama-cli runs elsewhere. All
that can be refused without weights is refused before any is read, and the file appears whole or not at all.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import psutil

from edgelab import assets
from edgelab.errors import EdgeLabError
from edgelab.lab.question import Settings, ask
from edgelab.lab.road import built
from edgelab.measure.isolation import Isolated
from edgelab.notation import DEFAULT_DEPLOYMENT
from edgelab.recipes import Recipe, parse
from edgelab.reference import EMBEDDED, resolve
from edgelab.storage import cache

if TYPE_CHECKING:
    from edgelab.storage.description import Description

ENDS = ("model.embed_tokens", "lm_head")
MEND = "free some space there, or name a file in another folder"


class ExportError(EdgeLabError):
    """A file that cannot be written as asked."""


@dataclass(frozen=True)
class Format:
    """A kind of file. what: in words. engine: the deployment that runs it here. suffix: of the file; "" for a folder.

    package: what writes it, where that is optional, as (module, name, extra). then: what to do with {path}.
    """

    what: str
    engine: str
    suffix: str
    then: str
    package: tuple[str, str, str] | None = None


FORMATS = {
    "gguf": Format(
        "a GGUF file",
        "llamacpp",
        ".gguf",
        "`llama-cli -m {path}` chats with it, and every other program that is built on llama.cpp opens it.",
    ),
    "onnx": Format(
        "a folder of ONNX Runtime GenAI",
        "onnxruntime",
        "",
        "`onnxruntime_genai.Model('{path}')` opens the folder, in Python as in C++, C# and Java.",
        ("onnxruntime_genai", "ONNX Runtime GenAI", "runtimes"),
    ),
    "litertlm": Format(
        "a bundle of LiteRT-LM",
        "litert",
        ".litertlm",
        "`litert-lm run {path}` chats with it, and an app opens it with LiteRT-LM, MediaPipe's successor.",
        ("litert_torch", "LiteRT's converter", "litert"),
    ),
}


@dataclass(frozen=True)
class Exported:
    """A file that was written. MB of 10**6 bytes: of all of it, and of the weights in it.

    predicted_mb: of all of it by the shape of the model, where that can be computed. then: what to do with it next.
    notes: which texts get other tokens where the file runs than here, in sentences; "" where none do.
    fast: whether EDGELAB_FAST had the recipe calibrate on less and train shorter.
    """

    recipe: str
    model: str
    to: str
    path: str
    file_mb: float
    weights_mb: float
    predicted_mb: float | None
    then: str
    notes: str
    fast: bool


def export(
    recipe: str, to: str, path: str | Path, *, model: str = EMBEDDED, seed: int = 0, force: bool = False
) -> Exported:
    """Write a recipe as a file of FORMATS: "gguf", "onnx" (path is a folder then) or "litertlm".

    The variant is made where it is not there yet, and kept in the cache as that of a row; the file of an engine that a
    row has made is copied. force: whether to replace an earlier file at `path`.
    Raises an EdgeLabError with one sentence, and leaves nothing at `path`, where the engine refuses the recipe or the
    model, the place is taken or cannot be written, or the process that writes it dies.
    """
    from edgelab.runtimes import NOTE, RuntimeRefused, support

    if to not in FORMATS:
        raise ExportError(f"No file is called {to!r}; there are {', '.join(FORMATS)}.")
    kind, asked, target = FORMATS[to], parse(recipe), Path(path).expanduser()
    _check_deployment(asked, kind)
    _check_place(target, kind, force)
    _check_installed(kind)
    if reason := support.refusal(kind.engine, model):
        raise RuntimeRefused(reason)
    _check_tokenizer(_described(model), kind)  # before weights are fetched and read
    source = resolve(model)
    settings = Settings(model=model, seed=seed, threads=psutil.cpu_count(logical=False) or 1)
    (question,) = ask([str(asked.on(kind.engine))], settings, interleave=False)
    variant = built(question)
    _sweep(target)
    with (
        Isolated("edgelab.lab.exporting:Writer", settings.threads, variant=str(variant), to=to) as writer,
        assets.staged(target, MEND) as draft,
        TemporaryDirectory(
            prefix=f".{target.name[:100]}.{os.getpid()}-", suffix=".part", dir=target.parent
        ) as work,
    ):
        made = Path(work) / "made"
        made.mkdir()
        notes = writer.call("check")
        predicted = writer.call("predict")
        weights = writer.call("write", folder=str(made), place=str(target.parent))
        (made / NOTE).unlink(missing_ok=True)
        for file in made.rglob("*"):  # libraries write some for their owner alone
            file.chmod(file.stat().st_mode | 0o444)
        whole = next(made.glob(f"*{kind.suffix}")) if kind.suffix else made
        whole.replace(draft)
    return Exported(
        recipe=asked.weights,
        model=source.name,
        to=to,
        path=str(target),
        file_mb=cache.tree_bytes(target) / 1e6,
        weights_mb=weights / 1e6,
        predicted_mb=None if predicted is None else predicted / 1e6,
        then=kind.then.format(path=target),
        notes=notes,
        fast=assets.fast() and bool(asked.techniques),
    )


def _check_deployment(asked: Recipe, kind: Format) -> None:
    if asked.runtime not in (DEFAULT_DEPLOYMENT, kind.engine):
        raise ExportError(
            f"{kind.what.capitalize()} is for {kind.engine}, and this recipe runs on {asked.runtime}; leave out what "
            "is behind the @."
        )


def _check_place(target: Path, kind: Format, force: bool) -> None:
    """Whether a file may be written there, before anything is made for it."""
    if kind.suffix and target.suffix != kind.suffix:
        raise ExportError(f"The name of {kind.what} ends in {kind.suffix}, and {target} does not; add it.")
    if not kind.suffix and target.suffix in (".onnx", ".zip"):
        raise ExportError(f"{kind.what.capitalize()} has several files; name a folder instead of {target}.")
    if not target.parent.is_dir():
        raise ExportError(f"There is no folder {target.parent}; make it first, or name another one.")
    if not os.access(target.parent, os.W_OK):
        raise ExportError(f"{target.parent} cannot be written; name a file in another folder.")
    if not os.path.lexists(target):
        return
    if not force:
        raise ExportError(
            f"{target} is there already; name another place, or replace it with --force (in Python force=True)."
        )
    if target.is_dir() != (not kind.suffix):
        raise ExportError(f"{target} is no place for {kind.what}, and is not replaced; name another one.")
    if target.is_dir() and any(target.iterdir()) and not (target / "genai_config.json").is_file():
        raise ExportError(
            f"{target} holds something else than {kind.what}, and is not replaced; name another one."
        )


def _check_installed(kind: Format) -> None:
    if kind.package is not None and importlib.util.find_spec(kind.package[0]) is None:
        from edgelab.runtimes import EngineMissing

        raise EngineMissing(*kind.package[1:])


def _sweep(target: Path) -> None:
    """Remove what killed exports to this place have left beside it."""
    for left in target.parent.glob(f".{target.name[:100]}.*.part"):
        named = cache.DRAFT.search(left.name)
        if named and not psutil.pid_exists(int(named["pid"])):
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)


class Writer:
    """Writes the file of a variant, in a process of its own: what it takes in memory ends with it."""

    def __init__(self, variant: str, to: str) -> None:
        self.variant, self.kind = Path(variant), FORMATS[to]

    def check(self) -> str:
        """Which texts get other tokens from the file, in sentences.

        Raises RuntimeRefused for a variant that the engine does not run, ExportError for one that no file holds.
        """
        from edgelab import runtimes
        from edgelab.storage import variants

        about = variants.read_description(self.variant)
        if reason := runtimes.find(self.kind.engine).refusal(about):
            raise runtimes.RuntimeRefused(reason)
        if about.adapter:
            raise ExportError(
                f"{self.kind.what.capitalize()} holds no adapter beside the weights; put merge behind the recipe."
            )
        return _check_tokenizer(self.variant, self.kind)

    def predict(self) -> int | None:
        """Bytes of a GGUF file by the shape of the model; None where its layers differ in type or in shape."""
        from edgelab.devices.file_sizes import gguf_bytes
        from edgelab.devices.shapes import ModelShape, ShapeError
        from edgelab.storage import variants

        about = variants.read_description(self.variant)
        if self.kind.suffix != ".gguf" or about.shapes:
            return None
        try:
            shape = ModelShape.from_config(variants.load_config(self.variant))
            types = _types(about, shape.layers * (len(shape.linear_shapes) - shape.fused))
            return None if types is None else gguf_bytes(shape, types[0], embedding=types[1])
        except ShapeError:
            return None

    def write(self, folder: str, place: str) -> int:
        """Put what the engine loads into an empty folder; returns the bytes of its weights.

        place: what a sentence calls the folder. Raises an EdgeLabError where the disk is full.
        """
        from safetensors import SafetensorError

        from edgelab import runtimes

        try:
            kept = runtimes.exported_before(self.kind.engine, self.variant)
            if kept is None:
                return runtimes.export_to(self.kind.engine, self.variant, Path(folder)).weights_bytes
            for file in kept.folder.glob(f"*{self.kind.suffix}"):
                shutil.copy2(file, folder)
            return kept.weights_bytes
        except OSError as error:
            raise assets.unwritable(Path(place), error, MEND) from None
        except runtimes.RuntimeRefused as error:  # a full disk, as safetensors says it
            if isinstance(error.__cause__, SafetensorError):
                raise assets.unwritable(Path(place), error.__cause__, MEND) from None
            raise


def _described(model: str) -> Path | None:
    """The folder with configuration and tokenizer of a model, whose configuration has been read, or None.

    From the Hub it holds the JSON files alone; a tokenizer in other files is looked at with the weights.
    """
    from huggingface_hub import try_to_load_from_cache

    if model == EMBEDDED:
        return None
    if (path := assets.find(model)) is not None:
        return path
    found = try_to_load_from_cache(model, "tokenizer.json")
    return Path(found).parent if isinstance(found, str) else None


def _check_tokenizer(folder: Path | None, kind: Format) -> str:
    """Which texts get other tokens from a file than here, in sentences.

    Raises ExportError where the file would have no tokenizer, without which no other program can run it on text.
    """
    from edgelab.gguf_files import tokenizer_writer

    if kind.suffix != ".gguf" or folder is None or not folder.is_dir():
        return ""
    try:
        return tokenizer_writer.differences(folder)
    except tokenizer_writer.TokenizerRefused as refused:
        raise ExportError(str(refused)) from None


def _types(about: Description, linear: int) -> tuple[str, str] | None:
    """The one type that all linear layers have in a GGUF file, and that of embedding and head; None for several."""
    from edgelab.runtimes import gguf

    def stored(name: str) -> str:
        how = about.how(name)
        return gguf.stored_as(how["bits"], how["zero_point"]).name

    plain = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[about.dtype]
    ends = {name for name in about.matrices if name in ENDS}
    inner = [stored(name) for name in about.matrices if name not in ends] or [plain] * linear
    outer = {stored(name) for name in ends} or {plain}
    if len(inner) != linear or len(set(inner)) > 1 or len(outer) > 1:
        return None
    return inner[0], outer.pop()
