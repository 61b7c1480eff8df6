"""A model for some of its tokens: rows of embedding and head, and numbers of tokens in its configuration."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import nn

from edgelab.recipes import RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TOLERANCE = 1e-4  # of the largest logit, in float32; a product of fewer rows may sum in another order


def numbers_in(tokenizer: PreTrainedTokenizerBase, original: PreTrainedTokenizerBase, rows: int) -> list[int]:
    """What the original calls each token of a tokenizer, in order, without those it has no row of `rows` for."""
    theirs, mine = original.get_vocab(), tokenizer.get_vocab()
    found = [theirs[token] for token in sorted(mine, key=mine.__getitem__)]
    return [number for number in found if number < rows]


def rows_of(model: PreTrainedModel) -> int:
    """Rows of embedding and head. Raises RecipeError where either is not float."""
    if not isinstance(embedding := model.get_input_embeddings(), nn.Embedding) or not isinstance(
        model.get_output_embeddings(), nn.Linear | None
    ):
        raise RecipeError(
            "Rows are cut from a float embedding and a float head; take prune.vocab before what quantizes them."
        )
    return len(embedding.weight)


def with_rows(model: PreTrainedModel, kept: list[int]) -> PreTrainedModel:
    """A copy of a model for the tokens `kept` in this order; it shares all weights but those of embedding and head.

    Raises RecipeError for one whose embedding or head is not float, or that has more for each token than these two.
    """
    rows = rows_of(model)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    twin = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    index = torch.tensor(kept)
    new = {old: place for place, old in enumerate(kept)}
    cut = {
        id(weight): nn.Parameter(weight.detach()[index], requires_grad=weight.requires_grad)
        for end in (embedding, head)
        for weight in (() if end is None else end.parameters())
    }
    for module in twin.modules():  # a weight may be at several places: a tied head, BERT's bias of its own
        for name, weight in list(module.named_parameters(recurse=False)):
            if id(weight) in cut:
                setattr(module, name, cut[id(weight)])
    ours, ends = twin.get_input_embeddings(), twin.get_output_embeddings()
    ours.num_embeddings, ours.padding_idx = len(kept), new.get(embedding.padding_idx)
    if ends is not None:
        ends.out_features = len(kept)
    for holder in (*settings_of(twin), *twin.modules()):
        if getattr(holder, "vocab_size", None) == rows:
            holder.vocab_size = len(kept)
    for settings in settings_of(twin):
        _rename(settings, new, rows)
    _check(model, twin, kept)
    return twin


def settings_of(model: PreTrainedModel) -> list[object]:
    """The configurations of a model, each once: its own, that of its text part, and that of generation."""
    found = (model.config, model.config.get_text_config(), model.generation_config)
    return list({id(one): one for one in found if one is not None}.values())


def named_tokens(settings: object) -> dict[str, list[int]]:
    """The numbers of the tokens that a configuration names, such as eos_token_id, by name: one or several."""
    found = {}
    for name, value in vars(settings).items():
        numbers = value if isinstance(value, list) else [value]
        if name.endswith("_token_id") and all(isinstance(one, int) for one in numbers):
            found[name] = numbers
    return found


def _rename(settings: object, new: dict[int, int], rows: int) -> None:
    """Call tokens by their new numbers, in place. A number that has no row, such as -1, means none and stays."""
    for name, numbers in named_tokens(settings).items():
        renamed = [new.get(one, one) for one in numbers if one in new or not 0 <= one < rows]
        several = isinstance(getattr(settings, name), list)
        setattr(settings, name, renamed if several else next(iter(renamed), None))


@torch.inference_mode()
def _check(model: PreTrainedModel, twin: PreTrainedModel, kept: list[int]) -> None:
    """Compare the logits of a few tokens: what else there is for each token, such as a second embedding, shows here."""
    probe = torch.linspace(0, len(kept) - 1, 8).long()  # up to the last, whose number has changed most
    tolerance = max(TOLERANCE, 2 * torch.finfo(model.dtype).eps)
    expected = model(input_ids=torch.tensor(kept)[probe][None], use_cache=False).logits[..., kept].float()
    try:
        found = twin(input_ids=probe[None], use_cache=False).logits.float()
        same = torch.allclose(found, expected, rtol=0, atol=tolerance * float(expected.abs().max()))
    except (IndexError, RuntimeError):
        same = False
    if not same:
        raise RecipeError(
            f"{type(model).__name__} keeps more for a token than a row of its embedding and one of its head, which "
            "prune.vocab does not know; quantize.embedding makes any embedding smaller."
        )
