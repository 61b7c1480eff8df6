"""Tiny models that have read a little, and the parity gate between one of them and an engine.

Their answers are far from uniform: of a model that knows nothing, any engine says the same.
"""

import math
import re

import torch

from edgelab import corpora
from edgelab.measure import parity
from edgelab.measure.perplexity import Slice
from edgelab.recipes import Context, parse
from tests import learned_tokenizers

ROWS = 512  # of the vocabulary
LENGTH, SCORED = 128, 64  # of a window of the text; ten times what a model with a window sees
# Left as they are, so that attention is sharp.
LOOKS = re.compile(r"\.(q_proj|k_proj|qkv_proj|query_key_value)\.")
GRIDS = {
    "float32": "none",
    "8 bits": "quantize.rtn:bits=8,group_size=32,symmetric=true",
    "4 bits": "quantize.rtn:bits=4,group_size=32",
}
# Layouts whose tokenizers are of that kind; those of the others are byte-level.
SENTENCEPIECE = ("mistral", "gemma", "gemma2", "gemma3_text", "phi3")


def kind_of(layout):
    """The kind of tokenizer that models of a layout have."""
    return "sentencepiece" if layout in SENTENCEPIECE else "byte level"


def learned_tokenizers_of_both_kinds():
    """One of each kind, which learned its tokens from the text that the models learn from."""
    text = corpora.read("wiki")[:120_000]
    pieces = learned_tokenizers.learned_pieces([text], ROWS - 259, letters=80)
    return {
        "byte level": learned_tokenizers.byte_level([text], ROWS),
        "sentencepiece": learned_tokenizers.sentencepiece(pieces),
    }


def tokenize(tokenizers):
    """Of each kind of tokenizer: tokens to learn from, and windows (8, LENGTH) of what is asked about."""
    text = corpora.read("wiki")[:120_000]
    ids = {kind: torch.tensor(tokenizer.encode(text).ids) for kind, tokenizer in tokenizers.items()}
    assert all(one.max() > 259 for one in ids.values())  # not bytes alone
    return {kind: (one[: -8 * LENGTH], one[-8 * LENGTH :].view(8, LENGTH)) for kind, one in ids.items()}


def train(model, read, asked):
    """Train a random model in place on the tokens `read`, and sharpen it until its mean entropy is below half of ln V.

    asked: windows (count, LENGTH) over which the entropy is.
    """
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and not LOOKS.search(name):
                parameter.mul_(0.25)
            elif name.endswith(("q_norm.weight", "k_norm.weight")):
                parameter.add_(3.0)  # of a norm of queries or keys
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(120):
        starts = torch.randint(len(read) - LENGTH, (8,), generator=generator)
        ids = torch.stack([read[start : start + LENGTH] for start in starts])
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    for _ in range(30):
        if entropy(model, asked) < 0.5 * math.log(ROWS):
            break
        sharpen(model)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def entropy(model, ids):
    logs = model(ids).logits.log_softmax(-1)
    return -(logs.exp() * logs).sum(-1).mean().item()


@torch.no_grad()
def sharpen(model):
    """Scale what all layers multiply by, in place."""
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.mul_(1.1)


def quantized(model, recipe):
    for technique in parse(recipe).techniques:
        model = technique.apply(model, Context(reference=model))
    return model


def pieces(logits, ids):
    """The second half of each window, as the gate wants it."""
    return [
        Slice(place, one[SCORED - 1 : -1], window[SCORED:], None)
        for place, (one, window) in enumerate(zip(logits, ids, strict=True))
    ]


def verdict(session, model, ids):
    """The gate's, over windows (count, LENGTH) of tokens."""
    with torch.inference_mode():
        expected = [model(window[None]).logits[0] for window in ids]
    found = [session.logits(window.tolist()) for window in ids]
    return parity.by_logits(pieces(found, ids), pieces(expected, ids))
