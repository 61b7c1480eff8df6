"""Text as `datasets.Dataset`: calibration, training and evaluation splits that never overlap.

A split is a range of characters of one text, as rows of one line each; joining the rows gives the range back.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgelab import assets
from edgelab.errors import EdgeLabError

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

CHARACTERS, SPARE = 6, 256  # of a token, more than most have; tokens that a cut may have changed
EMBEDDED = ("wiki", "web", "code", "stories", "technical", "multilingual")
EXTRACTION = "extraction"  # orders in messages and as JSON, from a file that this project has written
WRITTEN_FILE = "extraction.jsonl"
HUB = {"wikitext-2": ("Salesforce/wikitext", "wikitext-2-raw-v1")}

# (corpus, split) -> first and last character; a float is a fraction of the text, None its end.
SPLITS: dict[tuple[str, str], tuple[float | int, float | int | None]] = {
    ("wiki", "evaluation"): (0, 400_000),
    ("wiki", "training"): (500_000, None),
    ("web", "calibration"): (0, 400_000),
    ("web", "training"): (400_000, None),
    ("stories", "evaluation"): (0, 1 / 3),
    ("stories", "training"): (1 / 3, None),
    ("code", "evaluation"): (0, 400_000),
    ("code", "training"): (500_000, None),
    ("technical", "evaluation"): (0, None),
    ("multilingual", "evaluation"): (0, None),
}
WRITTEN = {
    (EXTRACTION, "evaluation"): "test",
    (EXTRACTION, "training"): "training",
}  # -> the split of its file
_HUB_SPLITS = {"evaluation": "test", "calibration": "train", "training": "validation"}


class CorpusError(EdgeLabError):
    """A corpus or split that does not exist, or a text too short for its use."""


@dataclass(frozen=True)
class TokenizedText:
    """A text with its tokens.

    ids: (tokens,) int64. ends: (tokens,) int64, the character of the text at which each token ends.
    """

    name: str
    text: str
    ids: Tensor
    ends: Tensor

    def characters(self, first: int, last: int) -> str:
        """The text that tokens `first` to `last - 1` cover."""
        begin = int(self.ends[first - 1]) if first else 0
        return self.text[begin : int(self.ends[last - 1])]


def load(corpus: str, split: str = "evaluation") -> Dataset:
    """Rows `text` (one line) and `start` (its first character in the whole text) of one split of a corpus.

    corpus: an embedded name, "wikitext-2" (needs the network once) or the path of a UTF-8 text file, which is for
    evaluation only. Raises CorpusError naming what there is.
    """
    return _lines(*_range(corpus, split))


def read(corpus: str, split: str = "evaluation") -> str:
    """A split of a corpus as one text; see `load`."""
    return _range(corpus, split)[0]


def extraction(split: str = "evaluation") -> list[tuple[str, str]]:
    """Items of the extraction task: a prompt with a message, and the order in it as one line of JSON.

    A space stands between the two, and belongs to the answer: tokenizers join it to what follows.
    """
    check(EXTRACTION, split)
    lines = (assets.data_dir() / WRITTEN_FILE).read_text(encoding="utf-8").splitlines()
    items = [item for item in map(json.loads, lines) if item["split"] == WRITTEN[EXTRACTION, split]]
    return [(f"Message: {item['message']}\nOrder:", item["answer"]) for item in items]


def check(corpus: str, split: str = "evaluation") -> None:
    """Raise CorpusError naming what there is, where a corpus has no such split. Reads no text."""
    if split not in _HUB_SPLITS:
        raise CorpusError(
            f"Texts have no split '{assets.shown(split)}'; use one of {', '.join(_HUB_SPLITS)}."
        )
    places = [*SPLITS, *WRITTEN]
    if corpus in HUB or (corpus, split) in places:
        return
    there = [name for name, which in places if which == split]
    if corpus in (*EMBEDDED, EXTRACTION):
        others = ", ".join(f"{name} ({split})" for name in there)
        raise CorpusError(
            f"'{corpus}' is not for {split}, so that texts never overlap; for {split} there is {others}."
        )
    path = assets.find(corpus) if split == "evaluation" else None
    if path is None or not path.is_file():
        others = ", ".join((*there, *HUB)) + (", or a text file" if split == "evaluation" else "")
        raise CorpusError(f"There is no corpus '{assets.shown(corpus)}' for {split}; use one of {others}.")


def _range(corpus: str, split: str) -> tuple[str, int]:
    """The text of a split, and where it begins in the whole."""
    check(corpus, split)
    if corpus in HUB:
        return _from_hub(corpus, split), 0
    if corpus == EXTRACTION:
        return "".join(f"{prompt} {answer}\n\n" for prompt, answer in extraction(split)), 0
    if (corpus, split) not in SPLITS:
        return _from_file(assets.find(corpus)), 0
    text = _embedded_text(corpus)
    begin, end = (_position(mark, len(text)) for mark in SPLITS[corpus, split])
    return text[begin:end], begin


def _from_file(path: Path) -> str:
    """The text of a file without byte-order marks, of which each part of a concatenated file may have one."""
    try:
        text = path.read_text(encoding="utf-8").replace("\ufeff", "")
    except OSError as error:
        raise CorpusError(
            f"{path} cannot be read ({error.strerror or error}); check its permissions."
        ) from None
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:  # binary, or UTF-16, whose every second byte is zero in most languages of Europe
        raise CorpusError(f"{path} is not UTF-8 text; save it as UTF-8 first.")
    if not text.strip():
        raise CorpusError(f"{path} is empty; give a text to evaluate on.")
    return text


def tokenize(
    corpus: str, tokenizer: PreTrainedTokenizerBase, split: str = "evaluation", tokens: int | None = None
) -> TokenizedText:
    """A split as one text and its tokens, without special tokens. Needs a fast tokenizer (for character offsets).

    tokens: how many are needed at least; a long text then ends at a line some way behind them. All by default.
    """
    text, name = read(corpus, split), identity(corpus)
    if tokens is not None:
        beginning = text[: text.find("\n", CHARACTERS * (tokens + SPARE)) + 1]
        if beginning:
            found = tokenize_text(beginning, tokenizer, name)
            if len(found.ids) >= tokens + SPARE:
                return found
    return tokenize_text(text, tokenizer, name)


def identity(corpus: str) -> str:
    """What a row calls a corpus: its name, or for a file its name and a hash of its content."""
    path = None if corpus in (*EMBEDDED, *HUB) else assets.find(corpus)
    if corpus == EXTRACTION:
        path = assets.data_dir() / WRITTEN_FILE
    if path is None or not path.is_file():
        return corpus
    try:
        return f"{path.name}-{assets.fingerprint(path)[:8]}"
    except OSError as error:
        raise CorpusError(
            f"{path} cannot be read ({error.strerror or error}); check its permissions."
        ) from None


def tokenize_text(text: str, tokenizer: PreTrainedTokenizerBase, name: str = "text") -> TokenizedText:
    """Any text and its tokens, without special tokens.

    Raises CorpusError where the tokenizer is one in Python, which does not say where in the text its tokens end.
    """
    import torch

    if not tokenizer.is_fast:
        raise CorpusError(
            f"{type(tokenizer).__name__} does not say which characters its tokens cover; give a model with a "
            "tokenizer.json."
        )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ends = torch.tensor([end for _, end in encoded["offset_mapping"]], dtype=torch.int64)
    return TokenizedText(name, text, torch.tensor(encoded["input_ids"], dtype=torch.int64), ends)


def check_tokens(ids: list[int], rows: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise CorpusError naming a token that an embedding of so many rows has none for.

    Special tokens that were added to a tokenizer later may have none; they do no harm until a text holds one.
    """
    if (largest := max(ids, default=0)) >= rows:
        raise CorpusError(
            f"The text holds '{tokenizer.convert_ids_to_tokens(largest)}', token {largest:,}, for which the embedding "
            f"of {rows:,} rows has none; take it out of the text, or give a model that was trained with it."
        )


def _embedded_text(corpus: str) -> str:
    text = assets.text_file(corpus).read_text(encoding="utf-8")
    return re.sub(r"</?doc\b[^>]*>", "", text) if corpus == "wiki" else text


def _position(mark: float | int | None, length: int) -> int:
    if mark is None:
        return length
    return int(mark * length) if isinstance(mark, float) else min(mark, length)


def _lines(text: str, begin: int) -> Dataset:
    from datasets import Dataset

    lines = re.findall(r".*\n|.+", text)
    starts, position = [], begin
    for line in lines:
        starts.append(position)
        position += len(line)
    return Dataset.from_dict({"text": lines, "start": starts})


def _from_hub(corpus: str, split: str) -> str:
    from datasets import load_dataset

    try:
        rows = load_dataset(*HUB[corpus], split=_HUB_SPLITS[split])
    except Exception:  # the Hub's client raises its own, the network's and datasets' exceptions
        raise CorpusError(
            f"'{corpus}' comes from the Hub, which cannot be reached now; use one of {', '.join(EMBEDDED)} offline."
        ) from None
    return "".join(rows["text"])
