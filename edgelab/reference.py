"""The reference: the uncompressed model and tokenizer that everything is compared with."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgelab import assets
from edgelab.errors import EdgeLabError
from edgelab.keys import key

if TYPE_CHECKING:  # naming a model and fingerprinting it need neither
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

EMBEDDED = "embedded"
PATTERNS = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")  # what a model is read from
EMBEDDED_NOTES = (
    "The embedded weights are SmolLM2-135M-Instruct decoded from a 4-bit GGUF file (Q4_1 linear layers, Q8_0 "
    "embedding). They are the baseline that everything is compared with, not the original full-precision "
    "checkpoint; formats equal to their own grid (GGUF Q4_1) are lossless on them."
)


class ReferenceError(EdgeLabError):
    """The named model cannot be loaded."""


@dataclass(frozen=True)
class Source:
    """Where a reference comes from, before its weights are read: cheap, and enough to name a measurement."""

    name: str
    folder: Path | str  # a folder, a GGUF file or a Hub id
    sha: str  # fingerprint of configuration, tokenizer and weights
    notes: str = ""


@dataclass
class Reference:
    """A model in evaluation mode with its tokenizer; `notes` says what a reader has to know about its origin."""

    name: str
    sha: str
    notes: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def load(name: str = EMBEDDED, dtype: torch.dtype | None = None) -> Reference:
    """Load a reference: "embedded", a Hub id, a folder with safetensors and a config, or a GGUF file.

    Raises ReferenceError where nothing can be loaded under that name.
    """
    source = resolve(name)
    return Reference(source.name, source.sha, source.notes, load_model(source, dtype), load_tokenizer(source))


def resolve(name: str = EMBEDDED) -> Source:
    """Find out what a name stands for and compute its fingerprint, without reading the weights into memory."""
    if name == EMBEDDED:
        folder = assets.model_folder()
        return Source(assets.EMBEDDED_NAME, folder, fingerprint(folder), EMBEDDED_NOTES)
    path = Path(name).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return Source(path.stem, path.resolve(), key(assets.fingerprint(path))[:16])
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        if not (path / "config.json").is_file() or not files:
            raise ReferenceError(
                f"{path} holds no model: a folder needs config.json, tokenizer files and *.safetensors "
                "(pickled weights are not loaded)."
            )
        return Source(path.resolve().name, path.resolve(), fingerprint(path))
    if path.is_absolute() or name.startswith(".") or name.count("/") > 1 or path.suffix == ".gguf":
        raise ReferenceError(
            f"There is no model at {name}; give a folder, a .gguf file, a Hub id, or '{EMBEDDED}'."
        )
    return _resolve_hub(name)


def fingerprint(folder: Path) -> str:
    """What a model is made of: weights with their names and shapes, configurations and tokenizer, by content.

    Every file that transformers may read counts, so that a changed rope_theta or merge is another model.
    """
    files = sorted(file for pattern in PATTERNS for file in folder.glob(pattern))
    return key([(file.name, assets.fingerprint(file)) for file in files])[:16]


def _resolve_hub(name: str) -> Source:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, allow_patterns=list(PATTERNS)))
    except Exception as error:
        try:
            folder = Path(snapshot_download(name, allow_patterns=list(PATTERNS), local_files_only=True))
        except (LocalEntryNotFoundError, OSError, ValueError):
            log.debug("hub said: %s", error)
            raise ReferenceError(
                f"'{name}' is neither a local folder nor can it be had from the Hub now; check the spelling and "
                f"the network, or use '{EMBEDDED}', which works offline."
            ) from None
    return Source(name, folder, resolve(str(folder)).sha)


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """The tokenizer of a reference. Raises ReferenceError where the folder has none."""
    from transformers import AutoTokenizer

    folder, options = _transformers_place(source)
    try:
        return AutoTokenizer.from_pretrained(folder, **options)
    except (OSError, ValueError, KeyError) as error:
        raise ReferenceError(f"No tokenizer can be loaded for {source.name}: {_first_line(error)}") from None


def load_config(source: Source) -> PretrainedConfig:
    """The model configuration of a reference."""
    from transformers import AutoConfig

    folder, options = _transformers_place(source)
    return AutoConfig.from_pretrained(folder, **options)


def load_model(source: Source, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The weights of a reference as a causal language model in evaluation mode, in float32 unless told otherwise."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    dtype = dtype or torch.float32
    folder, options = _transformers_place(source)
    try:
        if "gguf_file" in options:
            return assets.read_gguf(Path(folder) / options["gguf_file"]).to(dtype)
        with assets.no_progress_bar():
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ReferenceError(
            f"{source.name} cannot be loaded as a causal language model: {_first_line(error)}"
        ) from None
    return model.eval()


def _transformers_place(source: Source) -> tuple[Path | str, dict[str, str]]:
    path = Path(source.folder)
    return (path.parent, {"gguf_file": path.name}) if path.suffix == ".gguf" else (source.folder, {})


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
