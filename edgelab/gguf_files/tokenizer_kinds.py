"""Tokenizers as llama.cpp knows them, which `tokenizer_writer` and `tokenizer_reader` share.

llama.cpp has two kinds for what language models are trained with:

- "gpt2" is byte-level BPE. The file holds tokens and merges, and `pre` names the regular expressions that split a text
  before its pieces are merged.
- "llama" is the BPE of SentencePiece, with tokens for single bytes. The file holds a score for each token and no
  merges: any two neighbours merge that are a token together, the best score first, and of equal ones the leftmost.

A tokenizer that would get other tokens from llama.cpp is not written, and a file that states something else is not
read. Three things have no place in a file and are lost to llama.cpp: NFC, which composes characters that come in parts;
a space that is put before the first part of a text only, or before none that begins with one (Metaspace), where
llama.cpp puts it before every part between special tokens; and that a special token swallows the spaces after it, which
llama.cpp takes from the name Phi-3. The first two are noted for our own reader under NOTES, and told when a file is
exported; for the third the name is made to fit.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

NOTES = "edgelab.tokenizer"
KEY = "tokenizer.ggml."
SPACE = "▁"
# In the name of a model: special tokens swallow the spaces after them, ENDS among them, and KEEPS do not.
PHI3 = re.compile("(phi)-?(3)", re.IGNORECASE)
ENDS, KEEPS = "</s>", ("<unk>", "<s>", "<|endoftext|>")
IDS = {  # what transformers calls a token -> what the file calls its number
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "sep_token": "seperator_token_id",
    "pad_token": "padding_token_id",
    "mask_token": "mask_token_id",
}

DIGIT = r"\p{N}"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SUFFIXES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
GPT4 = rf"{SUFFIXES}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|%s| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{SPACES}"
QWEN35 = rf"{SUFFIXES}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{SPACES}"
CAPITALS, SMALL = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CASES = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{CAPITALS}*{SMALL}+%s|[^\r\n\p{{L}}\p{{N}}]?{CAPITALS}+{SMALL}*%s|%s"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{SPACES}"
)


@dataclass(frozen=True)
class Splitting:
    """How text is split before it is merged.

    patterns: regular expressions, each splitting the pieces of the one before. names: what llama.cpp calls it; the
    first is written. whole: a piece that is a token is not merged. begins: with BOS, where the file does not say.
    exact: llama.cpp splits every text so; else it approximates the patterns, and files are read and not written.
    """

    patterns: tuple[str, ...]
    names: str
    whole: bool = False
    begins: bool = False
    exact: bool = True


SPLITTINGS = (
    Splitting((GPT2,), "gpt-2 phi-2 olmo mpt jais trillion granite-docling gigachat mellum a.x-4.0 exaone4"),
    Splitting((DIGIT, GPT2), "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2"),
    Splitting(
        (GPT4 % r"\p{N}{1,3}",),
        "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2",
        whole=True,
        begins=True,
    ),
    Splitting((GPT4 % r"\p{N}{1,3}",), "smaug-bpe dbrx glm4 chatglm-bpe"),
    Splitting(
        (GPT4 % DIGIT,),
        "qwen2 stablelm2 deepseek-r1-qwen kormo f2llmv2 megrez hunyuan solar-open grok-2",
    ),
    Splitting((QWEN35,), "qwen35"),
    Splitting((CASES % ("", "", DIGIT),), "tekken", whole=True, begins=True, exact=False),
    Splitting(
        (CASES % (f"{SUFFIXES}?", f"{SUFFIXES}?", r"\p{N}{1,3}"),),
        "gpt-4o llama4 kanana2 talkie minimax-m2",
        exact=False,
    ),
)


def pairs(
    text: str, pieces: set[str] | dict[str, float], characters: bool = False
) -> Iterator[tuple[str, str]]:
    """The pairs of pieces that a token can be merged from, the longest first piece first. characters: also of any."""
    for cut in range(len(text) - 1, 0, -1):
        pair = text[:cut], text[cut:]
        if all(one in pieces or (characters and len(one) == 1) for one in pair):
            yield pair
