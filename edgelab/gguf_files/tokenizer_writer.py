"""Write a tokenizer into a GGUF file, where llama.cpp will make the same tokens of a text; refuse it elsewhere."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgelab.errors import EdgeLabError
from edgelab.gguf_files import tokenizer_kinds
from edgelab.gguf_files.tokenizer_kinds import DIGIT, GPT2, IDS, KEY, NOTES, SPACE, Splitting, pairs

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PreTrainedTokenizerBase

BYTE = re.compile(r"<0x[0-9A-F]{2}>")
BYTES = (*range(0xC0), *range(0xC2, 0xF5))  # that UTF-8 is made of
DIFFERENCES = {  # what is noted of a tokenizer -> what llama.cpp makes of it
    "NFC": "This tokenizer composes characters that come in parts (NFC) and llama.cpp does not: a text with such "
    "characters, an e with its accent behind it, say, gets other tokens there.",
    "first": "This tokenizer puts a space before a text, but before none that begins with one, and none behind a "
    "special token; llama.cpp puts it in both places: a line that begins with a space gets other tokens there.",
    "always": "This tokenizer puts a space before a text, but before none that begins with one; llama.cpp puts it "
    "there as well: a line that begins with a space gets other tokens there.",
}


class TokenizerRefused(EdgeLabError):
    """A tokenizer that llama.cpp would not follow."""


@dataclass(frozen=True)
class Contents:
    """What a file says of a tokenizer; texts, types and scores by the numbers of the tokens."""

    kind: str
    texts: list[str]
    types: list[int]
    begins: int | None  # the token before every text
    ends: int | None
    prefix: bool = False  # a space before every text
    pre: str | None = None
    merges: list[str] | None = None
    scores: list[float] | None = None
    notes: str = ""
    swallows: bool = False  # special tokens take the spaces after them, as those of Phi-3 do


def why_not(folder: Path) -> str | None:
    """Why the tokenizer of a folder cannot be written, in one sentence; None where it can."""
    try:
        differences(folder)
    except TokenizerRefused as refused:
        return str(refused)
    return None


def differences(folder: Path) -> str:
    """Which texts get other tokens from llama.cpp than from the tokenizer of a folder, in sentences; "" where none do.

    Raises TokenizerRefused for a tokenizer that cannot be written.
    """
    tokenizer = _loaded(folder)
    notes = _contents(tokenizer, len(tokenizer)).notes.split()
    return " ".join(DIFFERENCES[note] for note in notes)


def write(writer: GGUFWriter, folder: Path, vocabulary: int, name: str) -> None:
    """Add the tokenizer of a folder to the keys of a file, and the name of the model.

    vocabulary: rows of the embedding; numbers without a token become unused ones, and tokens beyond it are left out.
    Beside a tokenizer that cannot be written, see `why_not`, the file has none, and runs on token ids. The name is
    that of the model as far as the tokenizer allows it, see `named`.
    """
    try:
        tokenizer = _loaded(folder)
        said = _contents(tokenizer, vocabulary)
    except TokenizerRefused:
        writer.add_name(name)
        writer.add_tokenizer_model("none")
        return
    writer.add_name(named(name, said.swallows))
    writer.add_tokenizer_model(said.kind)
    writer.add_tokenizer_pre(said.pre or "default")
    writer.add_token_list(said.texts)
    if said.scores is not None:
        writer.add_token_scores(said.scores)
    writer.add_token_types(said.types)
    if said.merges is not None:
        writer.add_token_merges(said.merges)
    ids = {key: getattr(tokenizer, f"{name}_id") for name, key in IDS.items()}
    ids |= {
        key: one
        for key, one in (("bos_token_id", said.begins), ("eos_token_id", said.ends))
        if one is not None
    }
    if ids["eos_token_id"] is None:  # else llama.cpp takes number 11 or 2 for it
        ids["eos_token_id"] = _configured_eos(folder)
    for key, number in ids.items():
        if number is not None and number < vocabulary:
            writer.add_uint32(KEY + key, number)
    writer.add_add_bos_token(said.begins is not None)
    writer.add_add_eos_token(said.ends is not None)
    writer.add_add_space_prefix(said.prefix)
    if said.notes:
        writer.add_string(NOTES, said.notes)
    template = tokenizer.chat_template  # comes last, as in files of llama.cpp
    if isinstance(template, dict):
        template = [{"name": name, "template": one} for name, one in template.items()]
    if template:
        writer.add_chat_template(template)


def named(name: str, swallows: bool) -> str:
    """The name of a model with which llama.cpp lets special tokens swallow the spaces after them, or does not.

    llama.cpp takes that from "Phi-3" in the name, whatever the tokens are: it is added here, or broken by a space.
    """
    there = tokenizer_kinds.PHI3.search(name)
    if swallows:
        return name if there else f"{name} (Phi-3)"
    return tokenizer_kinds.PHI3.sub(r"\1 \2", name)


def _configured_eos(folder: Path) -> int | None:
    """The end of a text by the configuration, the first where it names several."""
    file = folder / "config.json"
    stated = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id") if file.is_file() else None
    first = next(iter(stated), None) if isinstance(stated, list) else stated
    return first if isinstance(first, int) else None


def _loaded(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, as it is used here. Raises TokenizerRefused where there is none."""
    from transformers import AutoTokenizer

    missing = TokenizerRefused(f"{folder.name} holds no tokenizer; put tokenizer.json of the model into it.")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise missing
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception:  # transformers and tokenizers raise what they like
        raise missing from None
    if not tokenizer.is_fast:
        raise TokenizerRefused(
            f"The tokenizer of {folder.name} has no tokenizer.json, which a GGUF file is written from; convert it."
        )
    return tokenizer


def _contents(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> Contents:
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    model = described["model"]
    if model["type"] != "BPE":
        raise TokenizerRefused(
            f"A GGUF file of this project takes a BPE tokenizer, and this one is {model['type']}; the file can only "
            "be run on token ids."
        )
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix") or model.get("dropout"):
        raise TokenizerRefused(
            "llama.cpp knows no marks at the ends of words and no dropout, and this tokenizer has them; the file can "
            "only be run on token ids."
        )
    for token in described["added_tokens"]:
        if token["lstrip"] or token["single_word"]:
            raise TokenizerRefused(
                f"llama.cpp finds {token['content']!r} wherever it is in a text, and this tokenizer looks at what is "
                "around it; the file can only be run on token ids."
            )
    swallows = _swallows(described, vocabulary)
    begins, ends = _around(tokenizer)
    kinds = {step["type"] for step in _steps(described["pre_tokenizer"], "pretokenizers")}
    make = _byte_level if "ByteLevel" in kinds else _sentencepiece
    return replace(make(described, vocabulary, begins, ends), swallows=swallows)


def _swallows(described: dict[str, Any], vocabulary: int) -> bool:
    """Whether added tokens take the spaces after them, as llama.cpp has it of the tokens of a Phi-3, or none does."""
    added = [token for token in described["added_tokens"] if token["id"] < vocabulary]
    if not any(token["rstrip"] for token in added):
        return False
    texts = {*described["model"]["vocab"], *(token["content"] for token in added)}
    if missing := [text for text in (tokenizer_kinds.ENDS, *tokenizer_kinds.KEEPS) if text not in texts]:
        raise TokenizerRefused(
            f"llama.cpp lets special tokens take the spaces after them only where there is a token {missing[0]!r}, "
            "which this tokenizer does not have; the file can only be run on token ids."
        )
    if odd := [token for token in added if token["rstrip"] == (token["content"] in tokenizer_kinds.KEEPS)]:
        how = ("leaves", "takes") if odd[0]["rstrip"] else ("takes", "leaves")
        raise TokenizerRefused(
            f"llama.cpp {how[0]} the spaces after {odd[0]['content']!r} where other special tokens take theirs, and "
            f"this tokenizer {how[1]} them; the file can only be run on token ids."
        )
    return True


def _around(tokenizer: PreTrainedTokenizerBase) -> tuple[int | None, int | None]:
    """The tokens that a text gets at its beginning and end, asked of the tokenizer itself."""
    whole, plain = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    place = next((at for at in (0, 1) if whole[at : at + len(plain)] == plain), None)
    after = [] if place is None else whole[place + len(plain) :]
    if place is None or len(after) > 1:
        raise TokenizerRefused(
            "llama.cpp puts at most one token before a text and one after it, and this tokenizer makes "
            f"{tokenizer.convert_ids_to_tokens(whole)} of 'a'; the file can only be run on token ids."
        )
    return (whole[0] if place else None), (after[0] if after else None)


def _steps(described: dict[str, Any] | None, of: str) -> Iterator[dict[str, Any]]:
    """The parts of a sequence, whose list has the name `of`, or the one part there is."""
    for step in (described or {}).get(of, [described] if described else []):
        yield from _steps(step, of) if of in step else [step]


def _tokens(described: dict[str, Any], vocabulary: int) -> tuple[list[str], list[int]]:
    """Texts and types of all numbers up to `vocabulary`."""
    from gguf import TokenType

    vocab = described["model"]["vocab"]
    texts: list[str | None] = [None] * vocabulary
    types = [int(TokenType.UNUSED)] * vocabulary
    for text, number in vocab.items():
        if number < vocabulary:
            texts[number], types[number] = text, int(TokenType.NORMAL)
    for token in described["added_tokens"]:
        if token["id"] < vocabulary:
            texts[token["id"]] = token["content"]
            types[token["id"]] = int(TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED)
    taken = {text for text in texts if text is not None}
    for number, text in enumerate(texts):
        if text is None:
            unused = f"[PAD{number}]"
            while unused in taken:  # llama.cpp loads no file with a text twice
                unused = f"[{unused}]"
            texts[number] = unused
    return texts, types


def _byte_level(described: dict[str, Any], vocabulary: int, begins: int | None, ends: int | None) -> Contents:
    normalizers = [step["type"] for step in _steps(described["normalizer"], "normalizers")]
    if normalizers not in ([], ["NFC"]):
        raise TokenizerRefused(
            f"llama.cpp leaves the characters of a text as they are, and this tokenizer changes them first "
            f"({', '.join(normalizers)}); the file can only be run on token ids."
        )
    model = described["model"]
    if model["unk_token"] and (missing := [one for one in BYTES if _byte_sign(one) not in model["vocab"]]):
        raise TokenizerRefused(
            f"llama.cpp leaves out bytes that have no token, such as {missing[0]:#04x}, and this tokenizer makes "
            f"{model['unk_token']!r} of them; the file can only be run on token ids."
        )
    texts, types = _tokens(described, vocabulary)
    merges = [" ".join(pair) for pair in model["merges"]]
    if not merges:
        raise TokenizerRefused(
            "llama.cpp loads no BPE without merges; the file can only be run on token ids."
        )
    splitting = _splitting(described)
    pre = splitting.names.split()[0]
    return Contents("gpt2", texts, types, begins, ends, pre=pre, merges=merges, notes=" ".join(normalizers))


def _byte_sign(byte: int) -> str:
    """The character that stands for a byte in the tokens of byte-level BPE."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return chr(byte) if byte in printed else chr(0x100 + sum(one not in printed for one in range(byte)))


def _splitting(described: dict[str, Any]) -> Splitting:
    """The splitting of llama.cpp that gives the pieces of a byte-level tokenizer."""
    *steps, last = _steps(described["pre_tokenizer"], "pretokenizers")
    patterns = tuple(map(_pattern, steps))
    if last["type"] != "ByteLevel" or None in patterns:
        raise TokenizerRefused(
            "llama.cpp has no name for how this tokenizer splits a text "
            f"({', '.join(step['type'] for step in (*steps, last))}); the file can only be run on token ids."
        )
    if last["add_prefix_space"]:
        raise TokenizerRefused(
            "llama.cpp puts no space before a text that it splits into bytes, and this tokenizer does; the file can "
            "only be run on token ids."
        )
    if last.get("use_regex", True):
        patterns += (GPT2,)
    whole = described["model"]["ignore_merges"]
    found = [one for one in tokenizer_kinds.SPLITTINGS if one.patterns == patterns]
    if not found or not found[0].exact:
        how = "splits by" if not found else "only approximates"
        raise TokenizerRefused(
            f"llama.cpp {'has no name for a tokenizer that ' if not found else ''}{how} "
            f"{' and then '.join(patterns) or 'nothing'}; the file can only be run on token ids."
        )
    for one in found:
        if one.whole == whole:
            return one
    if not _all_merged(described):
        raise TokenizerRefused(
            "This tokenizer has tokens that no merging leads to, and llama.cpp would "
            f"{'not ' if whole else ''}use them in this splitting; the file can only be run on token ids."
        )
    return found[0]


def _pattern(step: dict[str, Any]) -> str | None:
    """The regular expression by which a step splits, keeping all parts; None where it does something else."""
    if step["type"] == "Digits" and step["individual_digits"]:
        return DIGIT
    keeps = (step.get("behavior"), step.get("invert")) in (("Isolated", False), ("Removed", True))
    return step["pattern"].get("Regex") if step["type"] == "Split" and keeps else None


def _all_merged(described: dict[str, Any]) -> bool:
    """Whether merging the characters of every token gives the token, so that taking it whole is the same."""
    from tokenizers import Tokenizer

    model = Tokenizer.from_str(
        json.dumps(described | {"model": described["model"] | {"ignore_merges": False}})
    ).model
    added = {token["content"] for token in described["added_tokens"]}
    return all(len(model.tokenize(text)) == 1 for text in described["model"]["vocab"] if text not in added)


def _sentencepiece(
    described: dict[str, Any], vocabulary: int, begins: int | None, ends: int | None
) -> Contents:
    from gguf import TokenType

    model = described["model"]
    prefix, notes = _spaces(described)
    if lacking := [
        one
        for one in BYTES
        if f"<0x{one:02X}>" not in model["vocab"] and not (one < 0x80 and chr(one) in model["vocab"])
    ]:
        raise TokenizerRefused(
            f"llama.cpp wants a token for every byte, and this tokenizer has none for {lacking[0]:#04x}; the file can "
            "only be run on token ids."
        )
    if not model["byte_fallback"]:
        raise TokenizerRefused(
            "llama.cpp spells unknown characters in bytes, and this tokenizer does not; the file can only be run on "
            "token ids."
        )
    texts, types = _tokens(described, vocabulary)
    ranks = _ranks(described)
    added = {token["content"]: token for token in described["added_tokens"]}
    for number, text in enumerate(texts):
        if BYTE.fullmatch(text):
            types[number] = int(TokenType.BYTE)
        elif text == model["unk_token"] and text in added:
            types[number] = int(TokenType.UNKNOWN)
        # A run of spaces, which llama.cpp would look for before it writes spaces as SPACE.
        elif SPACE in text and text in ranks and not added.get(text, {}).get("special"):
            types[number] = int(TokenType.NORMAL)
    worst = 1 + max(ranks.values(), default=0)
    scores = [-float(ranks.get(text, worst)) for text in texts]
    return Contents("llama", texts, types, begins, ends, prefix, scores=scores, notes=notes)


def _spaces(described: dict[str, Any]) -> tuple[bool, str]:
    """Whether a tokenizer puts a space before a text, and what has to be noted of it."""
    normalizers = list(_steps(described["normalizer"], "normalizers"))
    steps = list(_steps(described["pre_tokenizer"], "pretokenizers"))
    prepends = normalizers[:1] == [{"type": "Prepend", "prepend": SPACE}]
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    vocab = described["model"]["vocab"]
    if normalizers[prepends:] == [replace]:
        # That splits at spaces, of which there are none any more.
        if all(step["type"] == "Split" and step["pattern"] == {"String": " "} for step in steps):
            return prepends, ""
    elif not normalizers and len(steps) == 1 and steps[0]["type"] == "Metaspace":
        [step] = steps
        alone = not step["split"] or not any(SPACE in text[1:] for text in vocab)
        if step["replacement"] == SPACE and alone:
            scheme = step["prepend_scheme"]
            return scheme != "never", "" if scheme == "never" else scheme
    kinds = [step["type"] for step in (*normalizers, *steps)]
    raise TokenizerRefused(
        f"llama.cpp has no name for how this tokenizer splits a text ({', '.join(kinds) or 'not at all'}); the file "
        "can only be run on token ids."
    )


def _ranks(described: dict[str, Any]) -> dict[str, int]:
    """The place of each token in the order in which merges make them.

    Raises TokenizerRefused where the merges are not all that there can be between tokens, those of one token together:
    SentencePiece, and llama.cpp with it, merges any two neighbours that are a token. Runs of one character may share a
    place, as they do in Llama 2, where the merges with the longest first piece come first: then a run grows from the
    left here as there.
    """
    model = described["model"]
    merges = [(one, two) for one, two in model["merges"]]
    last = {one + two: place for place, (one, two) in enumerate(merges)}
    ranks: dict[str, int] = {}
    shared: dict[int, list[int]] = {}  # places of merges by rank
    until = -1
    for place, (one, two) in enumerate(merges):
        if (text := one + two) not in ranks:
            ranks[text] = len(shared) if place > until else len(shared) - 1
            until = max(until, last[text])
        shared.setdefault(ranks[text], []).append(place)
    together = all(_run_of_merges([merges[place] for place in places]) for places in shared.values())
    found = [
        token for token in described["added_tokens"] if token["special"] or SPACE not in token["content"]
    ]
    pieces = {text for text in model["vocab"] if not BYTE.fullmatch(text)} - {
        token["content"] for token in found
    }
    # Runs of different characters may share a place; no token of an earlier one may be waiting for them.
    mixed = {rank for rank, places in shared.items() if len({merges[place][0][0] for place in places}) > 1}
    early = any(
        ranks[one + two] < ranks.get(piece, -1) and ranks[piece] in mixed
        for one, two in merges
        for piece in (one, two)
    )
    there = set(merges)
    whole = all(pair in there for text in pieces for pair in pairs(text, pieces, characters=True))
    if early or not (together and whole) or model["ignore_merges"]:
        raise TokenizerRefused(
            "llama.cpp merges any two neighbours that are a token together, and this tokenizer only those of its list "
            "of merges; the file can only be run on token ids."
        )
    return ranks


def _run_of_merges(merges: list[tuple[str, str]]) -> bool:
    """Whether merges give one token, or runs of one character with the longest first piece first.

    Runs of several characters may take turns: no run of one is a piece of a run of another.
    """
    if len({one + two for one, two in merges}) == 1:
        return True
    lengths: dict[str, list[int]] = {}  # of the first pieces, by the character of the run
    for one, two in merges:
        if len(characters := {*one, *two}) > 1:
            return False
        lengths.setdefault(characters.pop(), []).append(len(one))
    return all(each == sorted(each, reverse=True) for each in lengths.values())
