"""Read the tokenizer that a GGUF file states as one of transformers."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgelab.errors import listed
from edgelab.gguf_files import tokenizer_kinds
from edgelab.gguf_files.reader import GGUFError, opened
from edgelab.gguf_files.tokenizer_kinds import DIGIT, GPT2, IDS, KEEPS, KEY, NOTES, PHI3, SPACE, pairs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def read(path: Path) -> PreTrainedTokenizerFast:
    """The tokenizer that a file states. Raises GGUFError for one that is not known here, rather than guess."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    wanted = ("tokenizer.", NOTES, "general.name")
    said = {key: field.contents() for key, field in opened(path).fields.items() if key.startswith(wanted)}
    kind, texts = said.get(f"{KEY}model", "none"), said.get(f"{KEY}tokens")
    if kind not in KINDS:
        raise GGUFError(
            f"{path.name} holds a tokenizer of kind '{kind}', and {listed(KINDS)} are read here; give the "
            "safetensors folder."
        )
    if not texts:
        raise GGUFError(f"{path.name} holds no tokens; give the whole file.")
    named = {name: said.get(KEY + key, len(texts)) for name, key in IDS.items()}
    special = {name: texts[number] for name, number in named.items() if number < len(texts)}
    described = KINDS[kind](path.name, said, special)
    described |= {"version": "1.0", "truncation": None, "padding": None}
    described["added_tokens"] = _added_tokens(said)
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(described)),
        chat_template=_chat_template(said),
        clean_up_tokenization_spaces=False,
        **special,
    )


def _types(said: dict[str, Any]) -> Sequence[int]:
    from gguf import TokenType

    return said.get(f"{KEY}token_type") or [int(TokenType.NORMAL)] * len(said[f"{KEY}tokens"])


def _vocab(said: dict[str, Any]) -> dict[str, int]:
    """Tokens and their numbers, without those that fill a vocabulary up."""
    from gguf import TokenType

    numbered = enumerate(zip(said[f"{KEY}tokens"], _types(said), strict=True))
    padding = re.compile(r"\[+PAD\d+\]+")
    return {
        text or f"[EMPTY_{number}]": number
        for number, (text, kind) in numbered
        if kind != TokenType.UNUSED or not padding.fullmatch(text)
    }


def _added_tokens(said: dict[str, Any]) -> list[dict[str, Any]]:
    """The tokens that are found in a text before it is split."""
    from gguf import TokenType

    swallows = PHI3.search(said.get("general.name", ""))  # as llama.cpp has it
    found = (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED)
    return [
        {
            "id": number,
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": bool(swallows) and text not in KEEPS,
            "normalized": False,
            "special": kind != TokenType.USER_DEFINED,
        }
        for number, (text, kind) in enumerate(zip(said[f"{KEY}tokens"], _types(said), strict=True))
        if kind in found and text
    ]


def _chat_template(said: dict[str, Any]) -> str | dict[str, str] | None:
    named = "tokenizer.chat_template."
    templates = {key.removeprefix(named): text for key, text in said.items() if key.startswith(named)}
    default = said.get("tokenizer.chat_template")
    if not templates:
        return default
    return templates | ({"default": default} if default else {})


def _template(name: str, said: dict[str, Any], special: dict[str, str], begins: bool) -> dict[str, Any]:
    """The step that puts BOS before a text and EOS after it, where the file says so. begins: where it says nothing."""
    used = [
        token
        for token, adds in (
            ("bos_token", said.get(f"{KEY}add_bos_token", begins)),
            ("eos_token", said.get(f"{KEY}add_eos_token", False)),
        )
        if adds
    ]
    if missing := [token for token in used if token not in special]:
        raise GGUFError(
            f"{name} says that texts get a {missing[0].replace('_', ' ')}, and not which; give the whole file."
        )

    def around(sequence: str, kind: int) -> list[dict[str, Any]]:
        marks = {token: [{"SpecialToken": {"id": special[token], "type_id": kind}}] for token in used}
        text = {"Sequence": {"id": sequence, "type_id": kind}}
        return [*marks.get("bos_token", []), text, *marks.get("eos_token", [])]

    numbers = {special[token]: said[KEY + IDS[token]] for token in used}
    return {
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": [*around("A", 0), *around("B", 1)],
        "special_tokens": {
            text: {"id": text, "ids": [number], "tokens": [text]} for text, number in numbers.items()
        },
    }


def _model(vocab: dict[str, int], merges: list[tuple[str, str]], **settings: Any) -> dict[str, Any]:
    usual = {
        "dropout": None,
        "unk_token": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
    }
    affixes = {"continuing_subword_prefix": None, "end_of_word_suffix": None}
    return {"type": "BPE", **usual, **affixes, **settings, "vocab": vocab, "merges": merges}


def _read_byte_level(name: str, said: dict[str, Any], special: dict[str, str]) -> dict[str, Any]:
    pre = said.get(f"{KEY}pre", "default")
    splitting = next((one for one in tokenizer_kinds.SPLITTINGS if pre in one.names.split()), None)
    if splitting is None:
        raise GGUFError(
            f"{name} splits text as llama.cpp's '{pre}' does, which is not known here; give the safetensors folder."
        )
    if f"{KEY}merges" not in said:
        raise GGUFError(f"{name} holds no merges; give the whole file.")
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    isolated = {"behavior": "Isolated", "invert": False}
    by_gpt2 = splitting.patterns[-1] == GPT2
    steps: list[dict[str, Any]] = [
        {"type": "Digits", "individual_digits": True}
        if pattern == DIGIT
        else {"type": "Split", "pattern": {"Regex": pattern}, **isolated}
        for pattern in splitting.patterns[: -1 if by_gpt2 else None]
    ]
    steps.append(bytes_ | {"use_regex": by_gpt2})
    vocab = _vocab(said)
    # No token holds a space, and a merge may hold a pair that makes none here.
    merges = [(one, two) for one, _, two in (merge.partition(" ") for merge in said[f"{KEY}merges"])]
    return {
        "normalizer": {"type": "NFC"} if "NFC" in said.get(NOTES, "").split() else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps} if len(steps) > 1 else steps[0],
        "post_processor": _template(name, said, special, splitting.begins),
        "decoder": bytes_ | {"add_prefix_space": True, "use_regex": True},
        "model": _model(
            vocab,
            [pair for pair in merges if {*pair, "".join(pair)} <= vocab.keys()],
            ignore_merges=splitting.whole,
        ),
    }


def _read_sentencepiece(name: str, said: dict[str, Any], special: dict[str, str]) -> dict[str, Any]:
    from gguf import TokenType

    vocab, scores, types = _vocab(said), said.get(f"{KEY}scores"), _types(said)
    if scores is None:
        raise GGUFError(f"{name} holds no scores of its tokens; give the whole file.")
    pieces = {text: scores[number] for text, number in vocab.items() if types[number] == TokenType.NORMAL}
    merged = [pair for text in pieces for pair in pairs(text, pieces)]
    merged.sort(key=lambda pair: (pieces["".join(pair)], len(pair[0]), len(pair[1])), reverse=True)
    prefix = said.get(f"{KEY}add_space_prefix", True)
    scheme = {"first", "always"} & set(said.get(NOTES, "").split())
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    steps = [{"type": "Prepend", "prepend": SPACE}, replace] if prefix else [replace]
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    metaspace = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "".join(scheme), "split": False}
    return {
        "normalizer": None if scheme else {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": metaspace if scheme else None,
        "post_processor": _template(name, said, special, True),
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _model(
            vocab,
            merged,
            unk_token=special.get("unk_token"),
            fuse_unk=True,
            byte_fallback=True,
        ),
    }


KINDS = {"gpt2": _read_byte_level, "llama": _read_sentencepiece}
