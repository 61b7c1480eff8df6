"""The reference: the uncompressed model and tokenizer that everything is compared with."""

from __future__ import annotations

import logging
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgelab import assets, gguf_reader
from edgelab.errors import EdgeLabError, few
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


HUB_ID = re.compile(r"(?!\.)[\w.-]+(/[\w.-]+)?")
# Names of tensors that only quantized weights come with
QUANTIZED = re.compile(
    r"\.(qweight|qzeros|scales|weight_scale\w*|weight_packed|absmax|quant_state\b.*)$|_scales$"
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
    notes = [source.notes] if source.notes else []
    model = load_model(source, dtype, notes)
    return Reference(source.name, source.sha, " ".join(notes), model, load_tokenizer(source))


def resolve(name: str = EMBEDDED) -> Source:
    """Find out what a name stands for and compute its fingerprint, without reading the weights into memory."""
    if name == EMBEDDED:
        folder = assets.model_folder()
        return Source(assets.EMBEDDED_NAME, folder, fingerprint(folder), EMBEDDED_NOTES)
    path = assets.find(name)
    try:
        if path is not None and path.is_dir():
            return _resolve_folder(path)
        if path is not None and _is_gguf(path):
            return Source(path.stem, path.resolve(), key(assets.fingerprint(path))[:16])
    except OSError as error:
        raise ReferenceError(
            f"{assets.shown(name)} cannot be read ({error.strerror or error}); check its permissions."
        ) from None
    if path is None and HUB_ID.fullmatch(name) and not _is_gguf(Path(name)):
        return _resolve_hub(name)
    raise ReferenceError(
        f"There is no model at {assets.shown(name)}; give a folder, a .gguf file, a Hub id, or '{EMBEDDED}'."
    )


def _is_gguf(path: Path) -> bool:
    return path.suffix.lower() == ".gguf"


def _resolve_folder(path: Path) -> Source:
    if not (path / "config.json").is_file() or not any(path.glob("*.safetensors")):
        raise ReferenceError(
            f"{path} holds no model: a folder needs config.json, tokenizer files and *.safetensors "
            "(pickled weights are not loaded)."
        )
    return Source(path.resolve().name, path.resolve(), fingerprint(path))


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
    """The tokenizer of a reference. Raises ReferenceError where it has none, or one that is not the model's."""
    from transformers import AutoTokenizer

    folder, options = _transformers_place(source)
    config = None if options else load_config(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **options)
        # Where a class knows how it splits text and the folder no tokens, transformers makes one that knows none.
        known = set(tokenizer("a b", add_special_tokens=False)["input_ids"]) - set(tokenizer.all_special_ids)
    except Exception as error:  # transformers, tokenizers and sentencepiece raise what they like
        log.debug("the tokenizer cannot be loaded", exc_info=True)
        raise _without_tokenizer(source, _reason(error)) from None
    if not known:
        raise _without_tokenizer(source, "it has no tokens")
    if config is not None:
        _check_vocabulary(source, tokenizer, config)
    return tokenizer


def _without_tokenizer(source: Source, reason: str) -> ReferenceError:
    mend = "put tokenizer.json and tokenizer_config.json of the model into its folder"
    if _is_gguf(Path(source.folder)):
        mend = "give a whole GGUF file that holds one"
    return ReferenceError(f"No tokenizer can be loaded for {source.name} ({reason}); {mend}.")


def _check_vocabulary(source: Source, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> None:
    """Every token that text can become has a row of the embedding. Special ones that were added later need none."""
    rows = getattr(config.get_text_config(), "vocab_size", math.inf)
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    largest = max(set(tokenizer.get_vocab().values()) - special)
    if largest >= rows:
        raise ReferenceError(
            f"The tokenizer of {source.name} has tokens up to number {largest:,}, and the embedding {rows:,} rows; "
            "give the model with the tokenizer that it was trained with."
        )


def load_config(source: Source) -> PretrainedConfig:
    """The model configuration of a reference. Raises ReferenceError for what is no decoder of plain float weights."""
    from transformers import AutoConfig

    folder, options = _transformers_place(source)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, **options)
    except Exception as error:  # of JSON, of transformers, of huggingface_hub's checks of types
        log.debug("the configuration cannot be loaded", exc_info=True)
        raise _unloadable(source, error) from None
    if not options and (how := getattr(config, "quantization_config", None)):
        method = how.get("quant_method", "unknown") if isinstance(how, dict) else type(how).__name__
        raise _quantized(source, f"by '{method}'")
    if config.is_encoder_decoder:
        raise ReferenceError(
            f"{source.name} is an encoder-decoder model ({config.model_type}); give a model that has a decoder only."
        )
    return config


def load_model(
    source: Source, dtype: torch.dtype | None = None, notes: list[str] | None = None
) -> PreTrainedModel:
    """The weights of a reference as a causal language model in evaluation mode, in float32 unless told otherwise.

    notes: takes what a reader has to know, such as tensors of the checkpoint that the model has no place for.
    Raises ReferenceError where tensors are missing or of another shape, naming them: nothing is initialised at random.
    """
    import torch
    from transformers import AutoModelForCausalLM

    dtype = dtype or torch.float32
    folder, options = _transformers_place(source)
    try:
        with assets.quiet_loading():
            if options:
                return gguf_reader.read(Path(source.folder)).to(dtype)
            model, found = AutoModelForCausalLM.from_pretrained(
                folder,
                config=load_config(source),
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are named below
            )
        _check_tensors(source, found, [] if notes is None else notes)
        _check_direction(source, model)
    except EdgeLabError:
        raise
    except Exception as error:  # of transformers, safetensors, torch
        log.debug("the model cannot be loaded", exc_info=True)
        raise _unloadable(source, error) from None
    return model.eval()


def _check_tensors(source: Source, found: dict, notes: list[str]) -> None:
    """Compare the tensors of a checkpoint with those of the model, as transformers found them."""
    unexpected = sorted(found["unexpected_keys"])
    if any(map(QUANTIZED.search, unexpected)):
        raise _quantized(source, f"with {few(unexpected)}")
    if missing := sorted(found["missing_keys"]):
        raise ReferenceError(f"The weights of {source.name} lack {few(missing)}; give the whole checkpoint.")
    if mismatched := sorted(found["mismatched_keys"]):
        name, stored, wanted = mismatched[0]
        raise ReferenceError(
            f"{name} of {source.name} is {_by(stored)} and by its config.json {_by(wanted)}; give the configuration "
            "that belongs to the weights."
        )
    if unexpected:
        notes.append(f"Not read, because the model has no place for it: {few(unexpected)}.")


def _check_direction(source: Source, model: PreTrainedModel) -> None:
    """A model of the BERT family predicts from both sides, and its perplexity would mean nothing."""
    import torch

    if getattr(model.config, "is_decoder", True):
        return
    with torch.inference_mode():
        one, other = (model(torch.tensor([[0, token]])).logits[0, 0] for token in (1, 2))
    if not torch.allclose(one, other, rtol=1e-3, atol=1e-5):
        raise ReferenceError(
            f"{source.name} reads what follows a token to predict it ({model.config.model_type}); give a causal "
            "language model."
        )


def _quantized(source: Source, how: str) -> ReferenceError:
    return ReferenceError(
        f"{source.name} is a quantized checkpoint ({how}); give the float model that it was made from, and a recipe "
        "such as quantize.rtn."
    )


def _unloadable(source: Source, error: Exception) -> ReferenceError:
    return ReferenceError(
        f"{source.name} cannot be loaded as a causal language model ({_reason(error)}); check that its files are whole "
        "and belong together."
    )


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _transformers_place(source: Source) -> tuple[Path | str, dict[str, str]]:
    path = Path(source.folder)
    return (path.parent, {"gguf_file": path.name}) if path.is_file() else (source.folder, {})


def _reason(error: Exception) -> str:
    """The first sentence of what a library says, on one line."""
    if isinstance(error, KeyError) or not str(error).strip():
        return f"{type(error).__name__} {error}".strip()
    return " ".join(str(error).split()).partition(". ")[0].rstrip(".:")
