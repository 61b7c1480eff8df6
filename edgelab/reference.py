"""The reference: the uncompressed model and tokenizer that everything is compared with."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgelab import assets, checkpoints
from edgelab.checkpoints import ReferenceError
from edgelab.errors import EdgeLabError, few, first_sentence
from edgelab.gguf_files import reader, tokenizer_reader
from edgelab.keys import key

if TYPE_CHECKING:  # naming a model and fingerprinting it need neither
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

EMBEDDED = "embedded"
CONFIGURATION = ("*.json",)
# Names of a checkpoint that reads more than text -> those of its text part as a model of its own
TEXT_PART = {
    r"^(?:model\.)?(?:language_model|text_model)\.lm_head\.": "lm_head.",
    r"^(?:model\.)?(?:language_model|text_model)\.(?:model\.)?": "model.",
}
EMBEDDED_NOTES = (
    "The embedded weights are SmolLM2-135M-Instruct decoded from a 4-bit GGUF file (Q4_1 linear layers, Q8_0 "
    "embedding). They are the baseline that everything is compared with, not the original full-precision "
    "checkpoint; formats equal to their own grid (GGUF Q4_1) are lossless on them."
)


HUB_ID = re.compile(r"(?!\.)[\w.-]+(/[\w.-]+)?")
# Names of tensors that only quantized weights come with
QUANTIZED = re.compile(
    r"\.(qweight|qzeros|scales|weight_scale\w*|weight_packed|weight_format|absmax|quant_state\b.*|SCB|input_scale"
    r"|pre_quant_scale)$|_scales$"
)
UNMERGED = re.compile(r"\.(lora_[AB]\b.*|weight_mask)$")  # what training or pruning left beside the weights
# Where numbers are weights: other integers are masks and positions. Layers of experts are stacked to one *_proj.
WEIGHT = re.compile(r"\.weight$|_proj$")
FLOATS = {"F64", "F32", "F16", "BF16", "torch.float64", "torch.float32", "torch.float16", "torch.bfloat16"}


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
    """Load a reference: "embedded", a Hub id, a folder with weights and a config, or a GGUF file.

    Raises ReferenceError where nothing can be loaded under that name.
    """
    source = resolve(name)
    notes = [source.notes] if source.notes else []
    model = load_model(source, dtype, notes)
    return Reference(source.name, source.sha, " ".join(notes), model, load_tokenizer(source))


def resolve(name: str = EMBEDDED) -> Source:
    """Find out what a name stands for and compute its fingerprint, without reading the weights into memory."""
    with _reading(name):
        source = _find(name)
        path = Path(source.folder)
        return replace(
            source, sha=checkpoints.fingerprint(path) if path.is_dir() else key(assets.fingerprint(path))[:16]
        )


def config_of(name: str = EMBEDDED) -> PretrainedConfig:
    """The configuration of a named model, and nothing of its weights: from the Hub they are not even fetched."""
    with _reading(name):
        return load_config(_find(name, weights=False))


@contextmanager
def _reading(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ReferenceError(
            f"{assets.shown(name)} cannot be read ({error.strerror or error}); check its permissions."
        ) from None


def _find(name: str, weights: bool = True) -> Source:
    """Where a name leads, without a fingerprint. weights: whether they are wanted as well as the configuration."""
    if name == EMBEDDED:
        return Source(assets.EMBEDDED_NAME, assets.model_folder(), "", EMBEDDED_NOTES)
    path = assets.find(name)
    if path is not None and path.is_dir():
        checkpoints.check(path, str(path), weights)
        return Source(path.resolve().name, path.resolve(), "")
    if path is not None and _is_gguf(path):
        return Source(path.stem, path.resolve(), "")
    if path is None and HUB_ID.fullmatch(name) and not _is_gguf(Path(name)):
        folder = _fetched(name, checkpoints.PATTERNS if weights else CONFIGURATION)
        if weights and checkpoints.is_pickled(folder):
            folder = _fetched(name, (*checkpoints.PATTERNS, checkpoints.PICKLED))
        checkpoints.check(folder, name, weights)
        return Source(name, folder, "")
    raise ReferenceError(
        f"There is no model at {assets.shown(name)}; give a folder, a .gguf file, a Hub id, or '{EMBEDDED}'."
    )


def _is_gguf(path: Path) -> bool:
    return path.suffix.lower() == ".gguf"


def _fetched(name: str, patterns: tuple[str, ...]) -> Path:
    """The folder of a model of the Hub, fetched or as it was fetched before."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError

    fetch = partial(
        snapshot_download, name, allow_patterns=list(patterns), ignore_patterns=list(checkpoints.LEFT_OUT)
    )
    try:
        return Path(fetch())
    except Exception as error:
        try:
            return Path(fetch(local_files_only=True))
        except (LocalEntryNotFoundError, OSError, ValueError):
            log.debug("hub said: %s", error)
            if isinstance(error, GatedRepoError):
                raise ReferenceError(
                    f"'{name}' is gated: accept its licence on its page, https://huggingface.co/{name}, and log in "
                    "with `hf auth login`."
                ) from None
            raise ReferenceError(
                f"'{name}' is neither a local folder nor can it be had from the Hub now; check the spelling and "
                f"the network, or use '{EMBEDDED}', which works offline."
            ) from None


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """The tokenizer of a reference. Raises ReferenceError where it has none, or one that is not the model's."""
    from transformers import AutoTokenizer

    if (file := _gguf_file(source)) is not None:
        return tokenizer_reader.read(file)
    config = load_config(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.folder, trust_remote_code=False)
        # Where a class knows how it splits text and the folder no tokens, transformers makes one that knows none.
        known = set(tokenizer("a b", add_special_tokens=False)["input_ids"]) - set(tokenizer.all_special_ids)
    except Exception as error:  # transformers, tokenizers and sentencepiece raise what they like
        log.debug("the tokenizer cannot be loaded", exc_info=True)
        raise _without_tokenizer(source, first_sentence(error)) from None
    if not known:
        raise _without_tokenizer(source, "it has no tokens")
    _check_vocabulary(source, tokenizer, config)
    return tokenizer


def _without_tokenizer(source: Source, reason: str) -> ReferenceError:
    return ReferenceError(
        f"No tokenizer can be loaded for {source.name} ({reason}); put tokenizer.json and tokenizer_config.json of the "
        "model into its folder."
    )


def _check_vocabulary(source: Source, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> None:
    """Every token that text can become has a row of the embedding. Special ones that were added later need none."""
    rows = embedding_rows(config)
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    largest = max(set(tokenizer.get_vocab().values()) - special)
    if largest >= rows:
        raise ReferenceError(
            f"The tokenizer of {source.name} has tokens up to number {largest:,}, and the embedding {rows:,} rows; "
            "give the model with the tokenizer that it was trained with."
        )


def embedding_rows(config: PretrainedConfig) -> float:
    """Tokens that the embedding of a model has a row for; infinity where a configuration does not say."""
    return getattr(config.get_text_config(), "vocab_size", math.inf)


def load_config(source: Source) -> PretrainedConfig:
    """The model configuration of a reference, of its text part where it reads more than text.

    Raises ReferenceError for what is no decoder of plain float weights.
    """
    config = _text_part(source, _stated_config(source))
    _check_floats(source)
    if _gguf_file(source) is None and _has_own_head(source, config):
        _untie(config)
    return config


def _stated_config(source: Source) -> PretrainedConfig:
    from transformers import AutoConfig

    if (file := _gguf_file(source)) is not None:
        return reader.read_config(file)
    _check_layout(source)
    try:
        config = AutoConfig.from_pretrained(source.folder, trust_remote_code=False)
    except Exception as error:  # of JSON, of transformers, of huggingface_hub's checks of types
        log.debug("the configuration cannot be loaded", exc_info=True)
        raise unloadable(source.name, error) from None
    if how := getattr(config, "quantization_config", None):
        method = how.get("quant_method", "unknown") if isinstance(how, dict) else type(how).__name__
        raise _quantized(source, f"by '{method}'")
    if config.is_encoder_decoder:
        raise ReferenceError(
            f"{source.name} is an encoder-decoder model ({config.model_type}); give a model that has a decoder only."
        )
    _put_ends(source, config)
    return config


def _check_floats(source: Source) -> None:
    """Whether weights are stored as floats: transformers would take integers for values, without their scales."""
    stored = {
        name: dtype
        for name, (_, dtype) in checkpoints.stored(Path(source.folder), source.name).items()
        if WEIGHT.search(name)
    }
    if coded := [f"{name} in {dtype}" for name, dtype in stored.items() if dtype not in FLOATS]:
        raise _quantized(source, f"with {few(coded)}")


def _untie(config: PretrainedConfig) -> None:
    """Let a configuration say that the head is a matrix of its own, in place."""
    for one in (config, config.get_text_config()):
        one.tie_word_embeddings = False


def _has_own_head(source: Source, config: PretrainedConfig) -> bool:
    """Whether safetensors hold a head that differs from the embedding, which transformers then leaves untied."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if not getattr(config, "tie_word_embeddings", False) or checkpoints.is_pickled(Path(source.folder)):
        return False
    stored = {}
    for name, (file, _) in checkpoints.stored(Path(source.folder), source.name).items():
        stored[name] = file, name
        for other, ours in TEXT_PART.items():
            stored[re.sub(other, ours, name)] = file, name
    tied = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._tied_weights_keys or {}
    for pair in tied.items():
        # A checkpoint of the base model has its names without the first part.
        found = [stored.get(name) or stored.get(name.partition(".")[2]) for name in pair]
        if all(found) and not checkpoints.same(*found):
            return True
    return False


def _put_ends(source: Source, config: PretrainedConfig) -> None:
    """Name the tokens that end an answer in a configuration as generation_config.json does, in place.

    transformers generates by that file, and a chat model may name the end of its turns only there.
    """
    try:
        stated = json.loads((Path(source.folder) / "generation_config.json").read_text(encoding="utf-8"))
        ends = stated.get("eos_token_id")
    except (OSError, ValueError, AttributeError):  # transformers goes by the configuration then, too
        return
    if isinstance(ends, int) or (isinstance(ends, list) and ends):
        for one in (config, config.get_text_config(decoder=True)):
            one.eos_token_id = ends


def _check_layout(source: Source) -> None:
    """Whether transformers has the layout, and one of the classes, that a configuration names."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        stated = json.loads((Path(source.folder) / "config.json").read_text(encoding="utf-8"))
        layout, classes = stated.get("model_type"), stated.get("architectures") or []
    except (OSError, ValueError, AttributeError):  # transformers says what is wrong
        return
    its = f"transformers {transformers.__version__}"
    if layout and layout not in CONFIG_MAPPING:
        own = " comes with code of its own, which is not run here, and" if "auto_map" in stated else ""
        raise ReferenceError(
            f"{source.name}{own} has the layout '{layout}', which {its} does not know; give a model of another layout, "
            "such as llama, qwen3 or gemma3_text."
        )
    _check_scaling(source, stated)
    known = {name.lower() for name in dir(transformers)}  # what a config.json calls PhiMoE is Phimoe there
    if classes and not known & {name.lower() for name in classes}:
        raise ReferenceError(
            f"The config.json of {source.name} names {few(classes)}, and {its} has no such class; give a model that "
            "is loaded by one of its classes, such as LlamaForCausalLM."
        )


def _check_scaling(source: Source, stated: dict[str, Any]) -> None:
    """Whether transformers has the scaling of rotary frequencies that a configuration names."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = stated.get("rope_scaling") or stated.get("rope_parameters")
    kind = scaling.get("rope_type", scaling.get("type")) if isinstance(scaling, dict) else None
    if kind in (None, "default", *ROPE_INIT_FUNCTIONS):
        return
    mend = "an older name of 'longrope'; write that in its place" if kind == "su" else None
    known = ", ".join(sorted(ROPE_INIT_FUNCTIONS))
    raise ReferenceError(
        f"The config.json of {source.name} scales rotary frequencies by '{kind}', "
        + (f"{mend}." if mend else f"which transformers does not know; give one of {known}.")
    )


def _text_part(source: Source, config: PretrainedConfig) -> PretrainedConfig:
    """The configuration of the text part, where transformers has a class for that part alone; else the whole one.

    Raises ReferenceError where it has a class for neither.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    text = config.get_text_config(decoder=True)
    if text is config or type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
            return config
        raise ReferenceError(
            f"{source.name} has the layout '{config.model_type}', of which transformers has no causal language model "
            "of text; give a model of another layout, such as llama, qwen3 or gemma3_text."
        )
    text.tie_word_embeddings = getattr(config, "tie_word_embeddings", text.tie_word_embeddings)
    return text


def load_model(
    source: Source, dtype: torch.dtype | None = None, notes: list[str] | None = None
) -> PreTrainedModel:
    """The weights of a reference as a causal language model in evaluation mode, in float32 unless told otherwise.

    notes: takes what a reader has to know, such as tensors of the checkpoint that the model has no place for, or parts
    that read images. Raises ReferenceError where tensors are missing, of another shape or not finite, naming them:
    nothing is initialised at random.
    """
    import torch
    from transformers import AutoModelForCausalLM

    dtype = dtype or torch.float32
    try:
        with assets.quiet_loading():
            if (file := _gguf_file(source)) is not None:
                model = reader.read(file)
                for parameter in model.parameters():  # but no buffers: rotary frequencies stay exact
                    parameter.data = parameter.data.to(dtype)
                _check_finite(source, model)
                return model
            stated = _stated_config(source)
            config = _text_part(source, stated)
            _check_floats(source)
            model, found = AutoModelForCausalLM.from_pretrained(
                source.folder,
                config=config,
                dtype=dtype,
                use_safetensors=not checkpoints.is_pickled(Path(source.folder)),
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are named below
                key_mapping=None if config is stated else TEXT_PART,
            )
        notes = [] if notes is None else notes
        if config is not stated:
            vars(model).pop("_weight_conversions", None)  # saved again it is a model of text
            notes += _leave_out_other_parts(model, found)
        _check_tensors(source, found, notes)
        notes += _keep_own_head(model)
        _check_finite(source, model)
        _check_direction(source, model)
    except EdgeLabError:
        raise
    except Exception as error:  # of transformers, safetensors, torch
        log.debug("the model cannot be loaded", exc_info=True)
        raise unloadable(source.name, error) from None
    return model.eval()


def _leave_out_other_parts(model: PreTrainedModel, found: dict) -> list[str]:
    """A note that names the parts of a checkpoint beside that of text, whose tensors are then expected no more."""

    def part(name: str) -> str:
        return name.removeprefix("model.").partition(".")[0]

    own = {part(name) for name in model.state_dict()}
    others = {name for name in found["unexpected_keys"] if part(name) not in own}
    found["unexpected_keys"] = set(found["unexpected_keys"]) - others
    if not others:
        return []
    return [f"The text part alone, without {', '.join(sorted({part(name) for name in others}))}."]


def _keep_own_head(model: PreTrainedModel) -> list[str]:
    """A note where transformers left a head untied that the configuration ties; that says so then, too, in place."""
    from torch import nn

    stated = model.get_expanded_tied_weights_keys(all_submodels=True).keys()
    tied = model.all_tied_weights_keys.keys()
    if not stated - tied:
        return []
    for name in (
        stated & tied
    ):  # nothing is tied where a configuration says so, and the bias of BERT's head is still
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, nn.Parameter(model.get_parameter(name).detach().clone()))
    _untie(model.config)
    return ["The checkpoint has a head of its own, although its config.json ties it to the embedding."]


def _check_tensors(source: Source, found: dict, notes: list[str]) -> None:
    """Compare the tensors of a checkpoint with those of the model, as transformers found them."""
    unexpected = sorted(found["unexpected_keys"])
    if any(map(QUANTIZED.search, unexpected)):
        raise _quantized(source, f"with {few(unexpected)}")
    if unmerged := list(filter(UNMERGED.search, unexpected)):
        raise ReferenceError(
            f"{source.name} holds {few(unmerged)} beside the weights that they change; merge them and give that model."
        )
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


def _check_finite(source: Source, model: PreTrainedModel) -> None:
    for name, parameter in model.named_parameters():
        if parameter.numel() and not all(end.isfinite() for end in parameter.detach().aminmax()):
            found = "NaN" if parameter.isnan().any() else "infinity"
            raise ReferenceError(
                f"{name} of {source.name} holds {found}; give finite weights, in a number format that reaches as far "
                "as they do."
            )


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


def unloadable(name: str, error: Exception) -> ReferenceError:
    """What a library says against a model, in one sentence. name: what the sentence calls the model."""
    return ReferenceError(
        f"{name} cannot be loaded as a causal language model ({first_sentence(error)}); check that its files are whole "
        "and belong together."
    )


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _gguf_file(source: Source) -> Path | None:
    """The file of a reference that is one; None for a folder."""
    path = Path(source.folder)
    return path if path.is_file() else None
