"""Which recipe runs on which runtime, and why not: every runtime is asked about every way of storing weights.

The weights are those of a model of a few thousand parameters, which each recipe is applied to; a runtime refuses a
variant for what its description says, whatever technique chose the integers. A last part asks about other models. Asked
about a model of the reader's own, the small model has its configuration, and the description its sizes.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from edgelab import assets, recipes, runtimes
from edgelab.errors import EdgeLabError
from edgelab.model.shapes import skeleton
from edgelab.reference import config_of, unloadable
from edgelab.storage import variants
from edgelab.storage.description import Description
from edgelab.storage.kv_cache import head_shape
from edgelab.techniques.quantization.rtn import check_group_size, linear_layers

if TYPE_CHECKING:
    from transformers import PretrainedConfig

log = logging.getLogger(__name__)

LAYOUTS = {  # a recipe without calibration -> the techniques that store their weights alike
    "none": "",
    "quantize.fp16": "",
    "quantize.bf16": "",
    "quantize.rtn:bits=8,group_size=0": "qat",
    "quantize.rtn:bits=8,group_size=0,symmetric=true": "",
    "quantize.rtn:bits=5": "",
    "quantize.rtn:bits=4": "gptq, awq, autoround, mixed, qat",
    "quantize.rtn:bits=4,symmetric=true": "gptq, qat",
    "quantize.rtn:bits=4,group_size=0": "",
    "quantize.rtn:bits=4,embedding_bits=8": "",
    "quantize.rtn:bits=4 + quantize.embedding": "the same with any other",
    "quantize.rtn:bits=3": "gptq, awq, autoround, mixed, qat",
    "quantize.hqq:bits=4": "gptq after hqq",
    "quantize.nf4": "codebook",
    "quantize.dynamic": "static, smooth",
    "quantize.kv": "",
    "quantize.ternary": "qat:bits=1.58",
    "quantize.binary": "qat:bits=1",
    "native.int8": "",
    "native.int4": "",
}


MODELS = {  # a layout of transformers -> what the table calls it
    "mistral": "a mistral model",
    "qwen3": "a qwen2 or qwen3 model",
    "gemma": "a gemma, gemma2 or gemma3 model",
    "phi": "a phi model",
    "phi3": "a phi3 model",
    "stablelm": "a stablelm model",
    "gpt_neox": "an olmo2 or gpt_neox model",
    "opt": "an opt model",
}
UNEVEN = "a llama with one narrower MLP"
SMALL = 128  # inputs of a layer of the small model, or a multiple


@dataclass(frozen=True)
class Answer:
    """What a runtime says to a recipe: `reason` is None where it runs, else one sentence.

    alike: techniques that store their weights in the same way, or the model, where it is not a plain llama.
    """

    recipe: str
    alike: str
    runtime: str
    reason: str | None


def table(model: str | None = None) -> list[Answer]:
    """Every runtime's answer to every recipe of LAYOUTS and to other models. Needs no engine installed.

    model: as in `load`; asks about the recipes of LAYOUTS on this model alone, of which the configuration is read and
    no weight. Raises ReferenceError where there is none, or none that transformers makes a model of.
    """
    if model is not None:
        return list(_answers_about(config_of(model), assets.shown(model)))
    return [
        Answer(recipe, alike, name, runtimes.find(name).refusal(about))
        for recipe, alike, about in _descriptions()
        for name in _engines()
    ]


def refusal(runtime: str, model: str) -> str | None:
    """What a runtime has to say against the layout of a model, whatever the recipe; its configuration says enough."""
    return runtimes.find(runtime).refusal(Description("float32", config=config_of(model).to_dict()))


def _engines() -> list[str]:
    return [name for name, kind in recipes.deployments().items() if hasattr(kind, "engine")]


def _descriptions() -> Iterator[tuple[str, str, Description]]:
    model = _small_model("llama")
    for text, alike in LAYOUTS.items():
        recipe = recipes.parse(text)
        changed = recipe.apply(copy.deepcopy(model), recipes.Context(reference=model))
        yield recipe.weights, alike, variants.describe(changed)
    for layout, words in MODELS.items():
        yield "none", words, variants.describe(_small_model(layout))
    mlp = model.model.layers[0].mlp
    for layer in (mlp.gate_proj, mlp.up_proj):
        layer.weight, layer.out_features = nn.Parameter(layer.weight[:32].clone()), 32
    mlp.down_proj.weight, mlp.down_proj.in_features = nn.Parameter(mlp.down_proj.weight[:, :32].clone()), 32
    yield "none", UNEVEN, variants.describe(model)


def _answers_about(config: PretrainedConfig, name: str) -> Iterator[Answer]:
    """Answers for a model with this configuration. What no recipe makes of it, no runtime runs.

    name: what a sentence calls the model. Raises ReferenceError where transformers makes no model of the configuration.
    """
    try:
        whole = skeleton(config)
    except Exception as error:  # of any layout of transformers
        log.debug("no model of a %s", config.model_type, exc_info=True)
        raise unloadable(name, error) from None
    small = _shrunk(config)
    for text, alike in LAYOUTS.items():
        recipe = recipes.parse(text)
        about, reason = Description("float32", config=config.to_dict()), None
        try:
            _check_groups(recipe, whole)
            if small is not None:
                changed = recipe.apply(copy.deepcopy(small), recipes.Context(reference=small))
                described = variants.describe(changed)
                about = replace(described, config=about.config, matrices=_sized(described.matrices, whole))
        except EdgeLabError as error:
            reason = str(error)
        for name in _engines():
            yield Answer(recipe.weights, alike, name, reason or runtimes.find(name).refusal(about))


def _check_groups(recipe: recipes.Recipe, model: PreTrainedModel) -> None:
    """Raise RecipeError for groups that do not divide the inputs of the layers. The small model has other sizes."""
    for technique in recipe.techniques:
        if technique.method != "quantize.kv" and (size := getattr(technique, "group_size", 0)):
            layers = linear_layers(model, group_size=size).values()
            check_group_size(size, [layer.in_features for layer in layers])


def _shrunk(config: PretrainedConfig) -> PreTrainedModel | None:
    """A small model with all settings of a configuration but its sizes; heads keep theirs, as rotary settings do.

    Two layers, or one of each kind. None where the layout cannot be made small in this way.
    """
    small = copy.deepcopy(config)
    try:
        _, head = head_shape(config)
        heads = max(2, SMALL // math.gcd(SMALL, head))
        kinds = list(dict.fromkeys(getattr(config, "layer_types", None) or []))
        layers = max(2, len(kinds))
        sizes = {"vocab_size": 64, "hidden_size": heads * head, "intermediate_size": heads * head}
        sizes |= {"num_attention_heads": heads, "num_key_value_heads": 1, "num_hidden_layers": layers}
        for name, value in sizes.items():
            if getattr(config, name, None) is not None:
                setattr(small, name, value)
        if kinds:
            small.layer_types = (kinds * layers)[:layers]
        small.pad_token_id = None
        return AutoModelForCausalLM.from_config(small, dtype=torch.float32)
    except Exception:  # of any layout of transformers
        log.debug("no small model of a %s", config.model_type, exc_info=True)
        return None


def _sized(matrices: dict[str, dict], whole: PreTrainedModel) -> dict[str, dict]:
    """How matrices of a small model are stored, with the sizes that they have in the whole one."""
    there, found = dict(whole.named_modules()), {}
    for name, how in matrices.items():
        if name not in there:
            continue
        found[name] = how
        if "shape" in how:
            shape = list(there[name].weight.shape)
            in_rows = how.get("group_size") == how["shape"][1]
            found[name] = how | {"shape": shape} | ({"group_size": shape[1]} if in_rows else {})
    return found


def markdown(answers: list[Answer]) -> str:
    """The table of the documentation: a mark where a recipe runs, a number where not, and the reasons below."""
    names = list(dict.fromkeys(answer.runtime for answer in answers))
    reasons = list(dict.fromkeys(answer.reason for answer in answers if answer.reason))
    lines = [f"| recipe | {' | '.join(names)} |", f"| --- |{' :-: |' * len(names)}"]
    for recipe, alike in dict.fromkeys((answer.recipe, answer.alike) for answer in answers):
        marks = {
            a.runtime: str(reasons.index(a.reason) + 1) if a.reason else "✓"
            for a in answers
            if (a.recipe, a.alike) == (recipe, alike)
        }
        lines.append(f"| `{recipe}`{f', {alike}' if alike else ''} | {' | '.join(marks[n] for n in names)} |")
    return "\n".join([*lines, "", *(f"{number}. {reason}" for number, reason in enumerate(reasons, 1))])


def _small_model(layout: str) -> PreTrainedModel:
    config = AutoConfig.for_model(
        layout,
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
