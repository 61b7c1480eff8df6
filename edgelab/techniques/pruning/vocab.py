"""Vocabulary: fewer tokens. Embedding and head lose the rows of those that go, and the others spell them.

A byte-level BPE makes a token by merging two that it has made before, so that a token can stay only if those on the way
to it do:

    l i g h t  ->  l i gh t  ->  l igh t  ->  l ight  ->  light         light needs gh, igh and ight

Each is counted as often as a text makes it, on the way to others as well. Then no token is rarer than one that needs
it, the rarest go first, and each that goes costs the text about one more token wherever it was made. Bytes and special
tokens stay, so that there is no text that cannot be written.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from edgelab import assets, corpora
from edgelab.model.vocabulary import named_tokens, numbers_in, rows_of, settings_of, with_rows
from edgelab.recipes import Context, RecipeError, register

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# One token for each byte, as byte-level BPE writes it and as SentencePiece does; its sign for a space has no other.
BYTES = {*pre_tokenizers.ByteLevel.alphabet(), *(f"<0x{byte:02X}>" for byte in range(256)), "▁"}
Ranks = dict[tuple[str, str], int]


def made_on_the_way(token: str, ranks: Ranks) -> list[str]:
    """What BPE makes in merging the characters of a token, in order, and the characters first.

    The last is the token itself, unless merging does not get there. ranks: place of each pair in the list of merges.
    """
    parts = list(token)
    made = [*parts]
    while pairs := [place for place, pair in enumerate(pairwise(parts)) if pair in ranks]:
        place = min(pairs, key=lambda one: ranks[parts[one], parts[one + 1]])
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
        made.append(parts[place])
    return made


def times_made(vocab: dict[str, int], ranks: Ranks, used: Counter[int]) -> dict[str, int]:
    """How often a text makes each token, most often first; none comes before another that is made on the way to it.

    vocab: numbers of the tokens. used: how often each number is in the tokenized text. Tokens that it never makes come
    in the order of their numbers, and after them, as made -1 times, those that no merging leads to.
    """
    made = dict.fromkeys(vocab, 0)
    depth = {}
    for token, number in vocab.items():
        way = set(made_on_the_way(token, ranks)) & vocab.keys()
        depth[token] = max([number, *(vocab[one] for one in way)])
        if token in way:
            for one in way:
                made[one] += used[number]
        else:
            made[token] += used[number] or -1
    ordered = sorted(vocab, key=lambda token: (-made[token], depth[token], len(token)))
    return {token: made[token] for token in ordered}


def keep_only(described: dict[str, Any], kept: set[str]) -> None:
    """Change what tokenizer.json says, in place: tokens `kept`, numbered from 0, and the merges between them.

    Added tokens stay, and those that the model does not count among its own come last.
    """
    model, added = described["model"], described["added_tokens"]
    inside = sorted(model["vocab"].keys() & kept, key=model["vocab"].__getitem__)
    outside = [one["content"] for one in added if one["content"] not in model["vocab"]]
    new = {token: place for place, token in enumerate([*inside, *outside])}
    model["vocab"] = {token: new[token] for token in inside}
    model["merges"] = [[one, two] for one, two in model["merges"] if {one, two, one + two} <= kept]
    for one in added:
        one["id"] = new[one["content"]]
    if padding := described["padding"]:
        padding["pad_id"] = new[padding["pad_token"]]
    for step in _steps(described["post_processor"], "processors"):
        for one in step.get("special_tokens", {}).values():  # of a template
            one["ids"] = [new[token] for token in one["tokens"]]
        for end in step.keys() & {"cls", "sep"}:  # of BERT and RoBERTa
            step[end][1] = new[step[end][0]]


def _steps(described: dict[str, Any] | None, of: str) -> Iterator[dict[str, Any]]:
    """The parts of a sequence, whose list has the name `of`, or the one part there is."""
    for step in (described or {}).get(of, [described] if described else []):
        yield from _steps(step, of) if of in step else [step]


def describe_bpe(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What tokenizer.json says.

    Raises RecipeError for what is no BPE with tokens for single bytes, and where pieces of a text are not tokenized as
    in the text.
    """
    described = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else {}
    model = described.get("model", {})
    kinds = {step["type"] for step in _steps(described.get("decoder"), "decoders")}
    affixes = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
    if model.get("type") != "BPE" or affixes or not kinds & {"ByteLevel", "ByteFallback"}:
        kind = model.get("type", type(tokenizer).__name__)
        raise RecipeError(
            "prune.vocab spells the tokens that go in bytes, which takes a byte-level BPE, and this tokenizer is "
            f"{'a BPE without bytes' if kind == 'BPE' else kind}; quantize.embedding makes any embedding smaller."
        )
    first, second = tokenizer.tokenize("a"), tokenizer.tokenize(" a")
    if first == second or tokenizer.tokenize("a a") != first + second:
        raise RecipeError(
            "prune.vocab is measured on pieces of a text, and this tokenizer puts a space before each; "
            "quantize.embedding makes any embedding smaller."
        )
    return described


@register("prune.vocab", shown=("keep",))
@dataclass(frozen=True, kw_only=True)
class Vocab:
    """Remove the tokens that a text makes least often, or never; those that stay spell them.

    keep: tokens that stay, 0 for all that the text makes. text: corpora with a training split, joined by a slash, or
    a text file. Tokens of single bytes and special tokens always stay.
    """

    keep: int = 0
    text: str = "wiki/web/stories"

    def __post_init__(self) -> None:
        if self.keep < 0:
            raise RecipeError(f"prune.vocab:keep={self.keep} is a number of tokens from 1 on, or 0.")

    def reads(self) -> list[str]:
        """The name and a hash of the text where it is a file; that of a corpus never changes."""
        return [corpora.identity(name) for name, split in self._splits() if split != "training"]

    def apply(self, model: PreTrainedModel, context: Context) -> PreTrainedModel:
        """A copy of the model with fewer rows. The context gets their tokenizer, and a reference with the same rows."""
        tokenizer, rows = context.tokenizer, rows_of(model)
        described = describe_bpe(tokenizer)
        texts = [corpora.read(name, split) for name, split in self._splits()]
        before = Counter(_ids(tokenizer, texts))
        always = self._always(model, tokenizer)
        keep_only(described, always | self._chosen(described, tokenizer.get_vocab(), rows, always, before))
        made = _like(tokenizer, Tokenizer.from_str(json.dumps(described)))
        numbers = numbers_in(made, tokenizer, rows)
        pruned = with_rows(model, numbers)
        if context.reference is not None:
            context.reference = with_rows(context.reference, numbers)
        context.tokenizer = made
        longer = sum(1 for _ in _ids(made, texts)) / before.total() - 1
        context.record.notes.append(
            f"{len(numbers):,} of {rows:,} rows of the embedding stay, with which {self.text} has {longer:.1%} more "
            "tokens. What is per token, as perplexity and tokens/s are, does not compare across vocabularies; bits per "
            "byte do."
        )
        return pruned

    def _splits(self) -> list[tuple[str, str]]:
        """Names and splits of the texts. Raises RecipeError where there is no such text."""
        names = self.text.split("/")
        if all(name in (*corpora.EMBEDDED, *corpora.HUB) for name in names):
            return [(name, "training") for name in names]
        path = assets.find(self.text)
        if path is None or not path.is_file():
            raise RecipeError(
                f"prune.vocab:text={assets.shown(self.text)} is neither a text file nor corpora joined by a slash, "
                "such as wiki/web/stories."
            )
        return [(self.text, "evaluation")]  # the one that a file has

    def _always(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[str]:
        """Tokens that stay whatever the text: bytes, added ones, and all that tokenizer or configurations name."""
        names = [named_tokens(settings).values() for settings in settings_of(model)]
        named = {one for several in names for numbers in several for one in numbers}
        named |= {*tokenizer.all_special_ids, *tokenizer("")["input_ids"], *tokenizer.added_tokens_decoder}
        vocab = tokenizer.get_vocab()
        return {token for token, number in vocab.items() if token in BYTES or number in named}

    def _chosen(
        self,
        described: dict[str, Any],
        numbers: dict[str, int],
        rows: int,
        always: set[str],
        used: Counter[int],
    ) -> set[str]:
        """The tokens that stay besides those that always do."""
        vocab = {token: number for token, number in numbers.items() if number < rows}
        ranks = {(one, two): rank for rank, (one, two) in enumerate(described["model"]["merges"])}
        merged = {token: number for token, number in vocab.items() if token not in always or token in BYTES}
        made = times_made(merged, ranks, used)
        free = [token for token in made if token not in always]
        if self.keep == 0:
            return {token for token in free if made[token] > 0}
        fixed = len(always & vocab.keys())
        if not fixed < self.keep <= len(vocab):
            raise RecipeError(
                f"prune.vocab:keep={self.keep} should be above the {fixed:,} bytes and special tokens that always stay "
                f"and at most {len(vocab):,}, which is all there are."
            )
        return set(free[: self.keep - fixed])


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Iterator[int]:
    for text in texts:
        yield from tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _like(tokenizer: PreTrainedTokenizerBase, backend: Tokenizer) -> PreTrainedTokenizerFast:
    """A tokenizer with the special tokens and chat template of another."""
    settings = {
        name: getattr(tokenizer, name)
        for name in ("model_max_length", "padding_side", "clean_up_tokenization_spaces", "chat_template")
    }
    return PreTrainedTokenizerFast(tokenizer_object=backend, **tokenizer.special_tokens_map, **settings)
