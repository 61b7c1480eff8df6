"""GGUF files as models of transformers.

The reader of transformers takes sizes and tensors from a file and passes over what else it states: scaling of rotary
frequencies, biases, sliding windows. That is put right in the configuration here, and what cannot be is refused: a
model that loads computes what the file says.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgelab.errors import EdgeLabError, few

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFReader
    from transformers import PretrainedConfig, PreTrainedModel

# What a file may state -> what the configuration calls it
SETTINGS = {
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
BIASES = {"attn_q.bias": "attention_bias", "ffn_up.bias": "mlp_bias"}  # tensor of a block -> setting
# Change what the model computes, and the reader knows none of them.
FOREIGN = ("logit_scale", "embedding_scale", "residual_scale", "attention.scale", "attention.clamp_kqv")
FACTORS = "rope_freqs.weight"
LOW, HIGH, CONTEXT = 1.0, 4.0, 8192  # of the scaling of Llama 3, in every model that has been published


class GGUFError(EdgeLabError):
    """A GGUF file that is damaged, or states what transformers cannot compute."""


def read(path: Path) -> PreTrainedModel:
    """Decode a GGUF file to a float32 model. Raises GGUFError for what would compute something else than the file.

    The model that transformers returns calls itself quantized and refuses to be saved, so a plain one of the same
    configuration takes over its tensors.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    file = _opened(path)
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    _complete(config, file, path.name)
    decoded, found = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, config=config, dtype=torch.float32, output_loading_info=True
    )
    if missing := sorted(found["missing_keys"]):
        raise GGUFError(f"{path.name} lacks {few(missing)}; give the whole file.")
    _check_places(decoded, file, path.name)
    config = decoded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(decoded.state_dict(), assign=True)
    for name, buffer in decoded.named_buffers():  # rotary frequencies are buffers outside the state dict
        model.get_submodule(name.rpartition(".")[0]).register_buffer(
            name.rpartition(".")[2], buffer, persistent=False
        )
    model.tie_weights()
    model.generation_config = decoded.generation_config
    return model.eval()


def _opened(path: Path) -> GGUFReader:
    import gguf

    try:
        file = gguf.GGUFReader(path)
    except OSError as error:
        raise GGUFError(f"{path} cannot be read ({error.strerror or error}).") from None
    except Exception:  # what numpy, struct and the reader say of bytes that make no sense
        raise GGUFError(f"{path} is no whole GGUF file; fetch or convert it again.") from None
    if (parts := _stated(file, "split.count", 1)) > 1:
        raise GGUFError(
            f"{path.name} is one of {parts} parts; join them with `llama-gguf-split --merge` and give the result."
        )
    return file


def _stated(file: GGUFReader, name: str, default: Any = None) -> Any:
    field = file.get_field(name)
    return default if field is None else field.contents()


def _complete(config: PretrainedConfig, file: GGUFReader, name: str) -> None:
    """Put into a configuration what the file states and the reader of transformers passes over."""
    kind = _stated(file, "general.architecture")
    tensors = {tensor.name: tensor for tensor in file.tensors}

    def stated(key: str, default: Any = None) -> Any:
        return _stated(file, f"{kind}.{key}", default)

    if foreign := [key for key in FOREIGN if stated(key)]:
        raise GGUFError(
            f"{name} states {kind}.{foreign[0]}, which is not read here; give the safetensors folder."
        )
    if config.model_type == "mistral":  # by default it forgets what is 4096 tokens back
        config.sliding_window = None
    if heads := getattr(config, "num_attention_heads", 0):  # Mamba has none
        even = config.hidden_size // heads
        head = stated("attention.key_length", even)
        if head != getattr(config, "head_dim", even) and not hasattr(config, "global_head_dim"):
            config.head_dim = head
    for key, setting in SETTINGS.items():
        if (value := stated(key)) is not None and hasattr(config, setting):
            setattr(config, setting, value)
    for tensor, setting in BIASES.items():
        if hasattr(config, setting):
            setattr(config, setting, f"blk.0.{tensor}" in tensors)
    rope = getattr(config, "rope_parameters", None)
    if rope is None:
        return
    if "full_attention" in rope:  # Gemma 3 scales these layers alone
        rope["full_attention"] |= _scaling(stated, config, name)
        return
    rope["rope_theta"] = stated("rope.freq_base", rope["rope_theta"])
    rope |= _scaling(stated, config, name)
    if FACTORS in tensors:
        rope |= _scaling_by_factors(tensors[FACTORS].data, rope["rope_theta"], config.max_position_embeddings)


def _scaling(stated: Callable[..., Any], config: PretrainedConfig, name: str) -> dict[str, Any]:
    """The scaling of rotary frequencies that metadata describe, as `rope_parameters` has it."""
    scaling, factor = stated("rope.scaling.type", "none"), stated("rope.scaling.factor", 1.0)
    if scaling == "none" or (scaling == "linear" and factor == 1):
        return {}
    found = {"rope_type": scaling, "factor": factor}
    if scaling == "linear":
        return found
    if scaling != "yarn":
        raise GGUFError(
            f"{name} scales rotary frequencies by '{scaling}', which is not read here; give the safetensors folder."
        )
    original = stated("rope.scaling.original_context_length", config.max_position_embeddings)
    magnitude = stated("rope.scaling.attn_factor", 1.0) * (1 + 0.1 * math.log(factor))
    return found | {"original_max_position_embeddings": original, "attention_factor": magnitude}


def _scaling_by_factors(factors: np.ndarray, theta: float, context: int) -> dict[str, Any]:
    """Which scaling divides the rotary frequencies by these factors, (head size / 2,).

    Of Llama 3's scaling a file holds the result alone. Where its rule gives these factors the settings are found
    again, so that engines know it; else the factors are kept as they are, as one of longrope's two lists.
    """
    import numpy as np

    factors = np.asarray(factors, np.float64)
    factor = float(f"{factors.max():.6g}")
    if np.allclose(factors, factor, rtol=1e-5):
        return {"rope_type": "linear", "factor": factor}
    length = 2 * math.pi * theta ** (np.arange(len(factors)) / len(factors))  # wavelengths, in tokens
    # Between two wavelengths a frequency is (1 - s) / factor + s of itself; s = (context / length - LOW) / (HIGH - LOW)
    smooth = (1 / factors - 1 / factor) / (1 - 1 / factor)
    between = (smooth > 1e-4) & (smooth < 1 - 1e-4)
    original = CONTEXT
    if between.any():
        original = round(float(np.median((smooth * (HIGH - LOW) + LOW)[between] * length[between])))
    smooth = np.clip((original / length - LOW) / (HIGH - LOW), 0, 1)
    if np.allclose(1 / factors, (1 - smooth) / factor + smooth, rtol=1e-5):
        return {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": LOW,
            "high_freq_factor": HIGH,
            "original_max_position_embeddings": original,
        }
    return {
        "rope_type": "longrope",
        "short_factor": factors.tolist(),
        "long_factor": factors.tolist(),
        "attention_factor": 1.0,
        "original_max_position_embeddings": context,
    }


def _check_places(model: PreTrainedModel, file: GGUFReader, name: str) -> None:
    """Every number of the file has a place in the model, and rotates as many of each head as the file says."""
    import gguf

    depth = model.config.num_hidden_layers
    held = {tensor.data_ptr(): tensor.numel() for tensor in model.state_dict().values()}
    architecture = _stated(file, "general.architecture")
    stored = [one for one in file.tensors if not one.name.startswith("rope_")]
    if sum(int(one.n_elements) for one in stored) != sum(held.values()):
        kinds = {text: kind for kind, text in gguf.MODEL_ARCH_NAMES.items()}
        names = gguf.get_tensor_name_map(kinds[architecture], depth)
        known = {names.get_name(place, try_suffixes=(".weight", ".bias")) for place in model.state_dict()}
        left = [one.name for one in stored if one.name not in known]
        raise GGUFError(
            f"{name} holds tensors for which a {model.config.model_type} model has no place here "
            f"({few(left or [one.name for one in stored])}); give the safetensors folder."
        )
    rotated = _stated(file, f"{architecture}.rope.dimension_count")
    for module, buffer in model.named_buffers():
        if module.endswith("rotary_emb.inv_freq") and rotated not in (None, 2 * len(buffer)):
            raise GGUFError(
                f"{name} rotates {rotated} numbers of each head, and the model that is read {2 * len(buffer)}; give "
                "the safetensors folder."
            )
