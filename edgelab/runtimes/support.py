"""Which recipe runs on which runtime, and why not: every runtime is asked about every way of storing weights.

The weights are those of a model of a few thousand parameters, which each recipe is applied to; a runtime refuses a
variant for how it is stored, whatever technique chose the integers.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from edgelab import recipes, runtimes, variants

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


@dataclass(frozen=True)
class Answer:
    """What a runtime says to a recipe: `reason` is None where it runs, else one sentence."""

    recipe: str
    alike: str
    runtime: str
    reason: str | None


def table() -> list[Answer]:
    """Every runtime's answer to every recipe of LAYOUTS. Needs no engine: a runtime refuses by description."""
    model = _small_model()
    found = []
    for recipe, alike in LAYOUTS.items():
        changed = copy.deepcopy(model)
        for technique in recipes.parse(recipe).techniques:
            changed = technique.apply(changed, recipes.Context(reference=model))
        about = variants.describe(changed, variants.stored_tensors(changed)[1])
        found += [
            Answer(recipe, alike, name, runtimes.find(name).refusal(about)) for name in runtimes.RUNTIMES
        ]
    return found


def markdown(answers: list[Answer]) -> str:
    """The table of the README: a mark where a recipe runs, a number where it does not, and the reasons below."""
    names = list(runtimes.RUNTIMES)
    reasons = list(dict.fromkeys(answer.reason for answer in answers if answer.reason))
    lines = [f"| recipe | {' | '.join(names)} |", f"| --- |{' :-: |' * len(names)}"]
    for recipe, alike in LAYOUTS.items():
        marks = {
            a.runtime: str(reasons.index(a.reason) + 1) if a.reason else "✓"
            for a in answers
            if a.recipe == recipe
        }
        lines.append(f"| `{recipe}`{f', {alike}' if alike else ''} | {' | '.join(marks[n] for n in names)} |")
    return "\n".join([*lines, "", *(f"{number}. {reason}" for number, reason in enumerate(reasons, 1))])


def _small_model() -> PreTrainedModel:
    config = AutoConfig.for_model(
        "llama",
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
