"""Which recipe runs on which runtime, and why not: every runtime is asked about every way of storing weights.

The weights are those of a model of a few thousand parameters, which each recipe is applied to; a runtime refuses a
variant for what its description says, whatever technique chose the integers. A last part asks about other models.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from edgelab import recipes, runtimes
from edgelab.storage import variants
from edgelab.storage.description import Description

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
    "gemma": "a gemma, phi or stablelm model",
}
UNEVEN = "a llama with one narrower MLP"


@dataclass(frozen=True)
class Answer:
    """What a runtime says to a recipe: `reason` is None where it runs, else one sentence.

    alike: techniques that store their weights in the same way, or the model, where it is not a plain llama.
    """

    recipe: str
    alike: str
    runtime: str
    reason: str | None


def table() -> list[Answer]:
    """Every runtime's answer to every recipe of LAYOUTS and to other models. Needs no engine installed."""
    return [
        Answer(recipe, alike, name, runtimes.find(name).refusal(about))
        for recipe, alike, about in _descriptions()
        for name in recipes.deployments()
        if hasattr(recipes.deployments()[name], "engine")
    ]


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
        pad_token_id=None,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
