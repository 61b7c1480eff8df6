"""Tokenizers in GGUF files: llama.cpp gets our tokens from what is written, and so does what is read back.

Tokenizers are trained here on the embedded texts, in every splitting that is written and as SentencePiece's BPE.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from ctypes import POINTER, c_bool, c_char_p, c_int32, c_void_p
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, processors
from tokenizers import pre_tokenizers as splits
from transformers import AutoTokenizer, GemmaTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from edgelab import assets, corpora, reference
from edgelab.gguf_files import tokenizer_kinds, tokenizer_reader, tokenizer_writer
from edgelab.gguf_files.reader import GGUFError
from edgelab.gguf_files.tokenizer_kinds import DIGIT, GPT2, SPACE, Splitting
from edgelab.gguf_files.tokenizer_writer import why_not
from edgelab.runtimes import RuntimeRefused
from edgelab.runtimes import gguf as export
from edgelab.runtimes.llamacpp import LlamaCpp
from tests import learned_tokenizers
from tests.learned_tokenizers import SPECIAL

TEXTS = ("wiki", "stories", "code")
ODD = [
    "",
    " ",
    "\n",
    "a",
    " leading", "  two leading", "\tleading tab", "trailing ", "trailing  \n",
    "\r\n", "line\r\nline\r\n\r\nline", "a\n\n\nb", "\n\n 12", "\n\n12", "a   12", "one two  three   four    five",
    *[" " * length for length in range(3, 60, 4)],
    "a" + " " * 17 + "b", "\t\t\tdeep\t\t", " \t \n \t x", "x" + "\n" * 9 + "y",
    "It's, IT'S; we'll WE'LL they've I'd don't DON'T 'tis",
    "1234567 12.5e-3 0x1F ½ ² Ⅷ ٣٤٥ १२३",
    "😀 👩‍👩‍👧‍👦 🇫🇷 ❤️ 👍🏽",
    "e\u0301a\u0308o\u0302 n\u0303 \u0301alone",
    "漢字かなカナ 한국어 中文，标点。", "العربية مع تشكيل: مُحَمَّد", "हिन्दी भाषा", "ไทย", "Ελληνικά Русский עברית",
    "zero\u200bwidth\u200djoiner\u00a0no\u2003break\u3000wide\ufeff",
    "control \x00\x01\x1f\x7f\x85 chars", "▁ low ▁ line", "<0x0A> <s > </ s>",
    "€ £ ¥ © ™ … — “quoted” ‘x’", "a_b-c/d\\e|f~g^h`i{j}k[l]m<n>o", "CamelCaseÀÉîö ẞß ŒUVRE naïve",
    "!!!???...;;;:::((()))\n\n)}]", "x=1;y=2//z\n\tif(a&&b){return!c;}",
]  # fmt: skip
MARKS = re.compile("</?s>|<think>|<unk>")
MIXED_RUNS = [
    "\n\t\n\n\t\t  \n   \t\t\n" * 5 + "x",
    " " * 40 + "\n" * 40 + "\t" * 40 + "a",
    "a\n\n\n\tb\t\t\tc",
]
AROUND = ["<s>", "a<s>b", "one </s> two", "</s></s> x", " <s> y", "go <think> on", "<think>\n<think>x"]


@cache
def texts() -> tuple[str, ...]:
    """A thousand lines of each text, with their ends, among them empty ones."""
    whole = [corpora.read(name) + corpora.read(name, "training") for name in TEXTS]
    lines = [text.splitlines(keepends=True)[:1000] for text in whole]
    assert all(len(one) == 1000 for one in lines)
    return tuple(line for one in lines for line in one)


@cache
def learned_from() -> tuple[str, ...]:
    """What the tokenizers learn from: in tokens of single bytes, no one sees how a text was split."""
    return (*texts(), *corpora.read("multilingual").splitlines(keepends=True), *[*ODD, *AROUND] * 20)


def as_folder(backend: Tokenizer, folder: Path, **settings: Any) -> Path:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **settings)
    tokenizer.save_pretrained(folder)
    return folder


NAMED = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": None}


def adding(bos: bool, eos: bool, numbers: tuple[int, int] = (1, 2)) -> processors.TemplateProcessing:
    marks = ["<s>"] * bos, ["</s>"] * eos
    return processors.TemplateProcessing(
        single=[*marks[0], "$A", *marks[1]], special_tokens=[("<s>", numbers[0]), ("</s>", numbers[1])]
    )


@cache
def byte_level(patterns: tuple[str, ...]) -> str:
    """A byte-level BPE of 6,000 tokens that splits so, as JSON."""
    steps = [
        splits.Digits(individual_digits=True) if one == DIGIT else splits.Split(Regex(one), "isolated")
        for one in patterns
        if one != GPT2
    ]
    backend = learned_tokenizers.byte_level(learned_from(), 6000, steps, by_gpt2=GPT2 in patterns)
    backend.add_tokens([AddedToken("<think>", normalized=False)])
    return backend.to_str()


@cache
def sentencepiece(runs_of: str = SPACE) -> str:
    """A BPE of SentencePiece's kind as JSON: bytes, characters that are frequent, runs of spaces, and words.

    runs_of: the characters that there are runs of.
    """
    learned = [
        one
        for one in learned_tokenizers.learned_pieces(learned_from(), 4000, letters=200)
        if not MARKS.search(one)
    ]
    runs = [one * length for length in (2, 4, 8, 16, *range(3, 16)) for one in runs_of]
    whole = learned_tokenizers.sentencepiece([*dict.fromkeys([*learned, *runs_of, *runs])])
    whole.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    whole.add_tokens([AddedToken("<think>", normalized=False)])
    return whole.to_str()


class LlamaVocabulary:
    """The tokenizer of a file, as llama.cpp has it."""

    def __init__(self, file: Path) -> None:
        from edgelab.runtimes import llama_c

        self.library = llama_c.library()
        self.library.llama_tokenize.restype = c_int32
        self.library.llama_tokenize.argtypes = (
            c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool,
        )  # fmt: skip
        self.model = self.library.llama_model_load_from_file(
            str(file).encode(), self.library.llama_model_default_params()
        )
        assert self.model, llama_c.said[-3:]
        self.vocabulary = self.library.llama_model_get_vocab(self.model)

    def __call__(self, text: str) -> list[int]:
        raw = text.encode()
        room = (c_int32 * (len(raw) + 8))()
        count = self.library.llama_tokenize(self.vocabulary, raw, len(raw), room, len(room), True, True)
        return list(room[:count])

    def close(self) -> None:
        self.library.llama_model_free(self.model)


@pytest.fixture
def llama_cpp() -> Iterator[Callable[[Path], LlamaVocabulary]]:
    """`llama_cpp(file)(text)`: the tokens that llama.cpp makes of a text."""
    pytest.importorskip("xllamacpp")
    opened: list[LlamaVocabulary] = []

    def open_file(file: Path) -> LlamaVocabulary:
        opened.append(LlamaVocabulary(file))
        return opened[-1]

    yield open_file
    for one in opened:
        one.close()


@pytest.fixture
def written(new_model, tmp_path) -> Callable[..., tuple[PreTrainedTokenizerFast, Path]]:
    """`written(backend, rows, name, **names)`: a tokenizer and the file of a tiny model that was written with it."""

    def write(backend: Tokenizer, rows: int | None = None, name: str = "tiny", **settings: Any):
        folder = as_folder(backend, tmp_path / "tokenizer", **NAMED | settings)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        model = new_model("llama", vocab_size=rows or len(tokenizer))
        export.write_model(model, folder, tmp_path / "model.gguf", name, "none")
        return tokenizer, tmp_path / "model.gguf"

    return write


def said(file: Path) -> dict[str, Any]:
    """What the keys of a file say of its tokenizer."""
    fields = gguf.GGUFReader(file).fields
    return {key: field.contents() for key, field in fields.items() if key.startswith("tokenizer.")}


def name_in(file: Path) -> str:
    return gguf.GGUFReader(file).fields["general.name"].contents()


def different(tokenizer, other, lines) -> list[Any]:
    """The first three texts of which the two make other tokens, with both."""
    ours = tokenizer(list(lines))["input_ids"]
    theirs = map(other, lines) if isinstance(other, LlamaVocabulary) else other(list(lines))["input_ids"]
    return [row for row in zip(lines, ours, theirs, strict=True) if row[1] != row[2]][:3]


EXACT = [one for one in tokenizer_kinds.SPLITTINGS if one.exact]


def splitting(one: Splitting) -> Tokenizer:
    """The tokenizer that splits so."""
    described = json.loads(byte_level(one.patterns))
    described["model"]["ignore_merges"] = one.whole
    return Tokenizer.from_str(json.dumps(described))


@pytest.mark.embedded
@pytest.mark.parametrize("one", EXACT, ids=lambda one: one.names.split()[0])
def test_byte_level_tokens_are_the_same_everywhere(one, written, llama_cpp, monkeypatch):
    backend = splitting(one)
    backend.post_processor = adding(bos=one.whole, eos=not one.whole)
    tokenizer, file = written(backend)
    first, *others = one.names.split()
    assert said(file)["tokenizer.ggml.pre"] == first
    lines = [*ODD, *AROUND, *texts()]
    assert different(tokenizer, llama_cpp(file), lines) == []
    assert different(tokenizer, tokenizer_reader.read(file), lines) == []
    for name in others:  # which llama.cpp knows for the same
        monkeypatch.setattr(tokenizer_kinds, "SPLITTINGS", (replace(one, names=name),))
        _, file = written(backend)
        assert different(tokenizer, llama_cpp(file), [*ODD, *AROUND]) == []


@pytest.mark.embedded
@pytest.mark.parametrize("tied", ["", SPACE, f"{SPACE}\n\t"], ids=["none", "spaces", "several"])
@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_tokens_are_the_same_everywhere(prefix, tied, written, llama_cpp):
    """tied: runs of these have one score; of spaces in Llama 2 and Mistral, of three characters in Gemma 3."""
    described = json.loads(sentencepiece(tied or SPACE))
    if tied:
        merges = described["model"]["merges"]
        runs = [pair for pair in merges if "".join(pair).strip(pair[0][0]) == "" and pair[0][0] in tied]
        others = [pair for pair in merges if pair not in runs]
        runs.sort(key=lambda pair: (len(pair[0]), len(pair[1])), reverse=True)
        described["model"]["merges"] = others + runs if tied == SPACE else runs + others
    backend = Tokenizer.from_str(json.dumps(described))
    if prefix:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), backend.normalizer])
    lines = [*ODD, *AROUND, *MIXED_RUNS, *texts()]
    for bos, eos in ((False, False), (True, True), (True, False)):
        backend.post_processor = adding(bos, eos)
        tokenizer, file = written(backend, unk_token="<unk>")
        assert said(file)["tokenizer.ggml.model"] == "llama"
        scores = dict(
            zip(*(said(file)[f"tokenizer.ggml.{key}"] for key in ("tokens", "scores")), strict=True)
        )
        lengths, of_runs = range(3, 17), tied or SPACE
        assert len({scores[one * length] for one in of_runs for length in lengths}) == (1 if tied else 14)
        assert different(tokenizer, llama_cpp(file), lines) == []
        lines = [*ODD, *AROUND, *MIXED_RUNS]
    back = tokenizer_reader.read(file)
    assert different(tokenizer, back, texts()) == different(tokenizer, back, lines) == []
    plain = [line for line in ODD if SPACE not in line]
    assert [back.decode(one) for one in back(plain, add_special_tokens=False)["input_ids"]] == plain


@pytest.mark.embedded
@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_a_space_before_the_first_word_alone(scheme, written, llama_cpp):
    """Llama 2 and Mistral as transformers has them. llama.cpp differs before a space, and behind special tokens."""
    backend = Tokenizer.from_str(sentencepiece())
    backend.normalizer = None
    backend.pre_tokenizer = splits.Metaspace(prepend_scheme=scheme, split=False)
    backend.post_processor = adding(bos=True, eos=False)
    tokenizer, file = written(backend, unk_token="<unk>")
    lines = [*ODD, *AROUND, *texts()]
    assert different(tokenizer, tokenizer_reader.read(file), lines) == []
    assert said(file)["tokenizer.ggml.add_space_prefix"] is (scheme != "never")
    told = tokenizer_writer.differences(file.parent / "tokenizer")
    assert told.count("gets other tokens there") == (scheme != "never") and "\n" not in told
    if scheme != "never":
        assert len(different(tokenizer, llama_cpp(file), [" leading"])) == 1
        assert ("behind a special token" in told) == bool(different(tokenizer, llama_cpp(file), ["a<s>b"]))
        lines = [line for line in (*ODD, *texts()) if not line.startswith((" ", SPACE))]
    assert different(tokenizer, llama_cpp(file), lines) == []


@pytest.mark.embedded
@pytest.mark.parametrize("kind", [GemmaTokenizer, LlamaTokenizer])
def test_the_classes_of_transformers(kind, new_model, llama_cpp, tmp_path):
    model = json.loads(sentencepiece())["model"]
    made = kind(
        vocab=model["vocab"], merges=list(map(tuple, model["merges"])), **NAMED | {"unk_token": "<unk>"}
    )
    made.save_pretrained(tmp_path / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert type(tokenizer) is kind and why_not(tmp_path / "tokenizer") is None
    file = tmp_path / "model.gguf"
    export.write_model(
        new_model("llama", vocab_size=len(tokenizer) + 3), tmp_path / "tokenizer", file, "tiny", "none"
    )
    assert different(tokenizer, tokenizer_reader.read(file), [*ODD, *AROUND, *texts()]) == []
    lines = [*ODD, *AROUND, *texts()]
    if told := tokenizer_writer.differences(tmp_path / "tokenizer"):
        lines = [line for line in (*ODD, *texts()) if not line.startswith((" ", SPACE))]
    assert different(tokenizer, llama_cpp(file), lines) == []
    assert ("a line that begins with a space" in told) == (kind is LlamaTokenizer)


@pytest.mark.embedded
def test_composed_characters(written, llama_cpp):
    """NFC is noted for us; llama.cpp takes a text as it is."""
    backend = splitting(EXACT[0])
    backend.normalizer = normalizers.NFC()
    tokenizer, file = written(backend)
    apart, composed = "e\u0301te\u0301 A\u030a", "été Å"
    back = tokenizer_reader.read(file)
    assert back(apart)["input_ids"] == tokenizer(apart)["input_ids"] == tokenizer(composed)["input_ids"]
    assert different(tokenizer, llama_cpp(file), [composed, *texts()[:200]]) == []
    assert len(different(tokenizer, llama_cpp(file), [apart])) == 1
    assert "composes characters that come in parts (NFC)" in tokenizer_writer.differences(
        file.parent / "tokenizer"
    )


@pytest.mark.embedded
@pytest.mark.parametrize("inexact", [one for one in tokenizer_kinds.SPLITTINGS if not one.exact])
def test_a_splitting_that_llama_cpp_approximates_is_read_and_not_written(
    inexact, written, tmp_path, monkeypatch
):
    backend = splitting(inexact)
    assert why_not(as_folder(backend, tmp_path / "refused", **NAMED)).startswith(
        "llama.cpp only approximates [^"
    )
    monkeypatch.setattr(
        tokenizer_kinds, "SPLITTINGS", tuple(replace(one, exact=True) for one in tokenizer_kinds.SPLITTINGS)
    )
    tokenizer, file = written(backend)
    assert different(tokenizer, tokenizer_reader.read(file), [*ODD, *AROUND, *texts()]) == []


@pytest.mark.embedded
def test_the_embedded_model(written, llama_cpp):
    """Digits stand alone in its own file, as its `pre` says; in the tokenizer that was decoded from it they do not."""
    lines = [*ODD, *AROUND, *texts()]
    own = assets.home() / "assets" / "gguf" / assets.GGUF_FILE
    assert different(tokenizer_reader.read(own), llama_cpp(own), lines) == []
    ours = reference.load_tokenizer(reference.resolve())
    _, file = written(ours.backend_tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>")
    assert different(ours, llama_cpp(file), lines) == []
    assert ours("in\n\n12")["input_ids"] != tokenizer_reader.read(own)("in\n\n12")["input_ids"]


def hand_made(merges: list[str], **changes: Any) -> dict[str, Any]:
    """SentencePiece's BPE of three letters as tokenizer.json says it; merges as "a b"."""
    words = ["a", "b", "c", SPACE, *dict.fromkeys(merge.replace(" ", "") for merge in merges)]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    backend = Tokenizer(
        models.BPE(
            {token: number for number, token in enumerate(tokens)}, [], unk_token="<unk>", byte_fallback=True
        )
    )
    backend.normalizer = normalizers.Replace(" ", SPACE)
    backend.add_special_tokens(SPECIAL)
    described = json.loads(backend.to_str())
    described["model"] |= {"merges": [merge.split() for merge in merges]} | changes.pop("model", {})
    return described | changes


def folder_of(described: dict[str, Any], folder: Path) -> Path:
    return as_folder(Tokenizer.from_str(json.dumps(described)), folder, **NAMED | {"unk_token": "<unk>"})


def write_alone(folder: Path, file: Path, rows: int, **others: Any) -> Path:
    """A file of a tokenizer without a model. others: keys of the tokenizer to set besides, None for none."""
    writer = gguf.GGUFWriter(file, "llama")
    tokenizer_writer.write(writer, folder, rows, "tiny")
    [keys] = writer.kv_data
    for key, value in others.items():
        keys.pop(f"tokenizer.ggml.{key}", None)
        if value is not None:
            add = writer.add_bool if isinstance(value, bool) else writer.add_string
            add(f"tokenizer.ggml.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return file


def test_scores_by_hand(tmp_path):
    """bc is made first, then ab, then abc from either; the others are never made, and come last."""
    described = hand_made(["b c", "a b", "ab c", "a bc"])
    file = write_alone(folder_of(described, tmp_path / "tokenizer"), tmp_path / "model.gguf", 266)
    keys = said(file)
    texts_, scores, types = (keys[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores", "token_type"))
    assert texts_[259:] == ["a", "b", "c", SPACE, "bc", "ab", "abc"]
    assert scores[259:] == [-3, -3, -3, -3, 0, -1, -2]
    assert types[:4] == [2, 3, 3, 6] and types[258:] == [6, *[1] * 7]
    assert keys["tokenizer.ggml.add_bos_token"] is False and keys["tokenizer.ggml.add_space_prefix"] is False
    assert keys["tokenizer.ggml.unknown_token_id"] == 0
    back = tokenizer_reader.read(file)
    assert back.tokenize("abc bc abb") == ["abc", SPACE, "bc", SPACE, "ab", "b"]
    assert back("é")["input_ids"] == [3 + 0xC3, 3 + 0xA9]


def test_numbers_without_a_token_and_tokens_without_a_row(byte_tokenizer, tmp_path):
    described = json.loads(byte_tokenizer.backend_tokenizer.to_str())
    token = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    described["added_tokens"] += [
        token | {"id": 300, "content": "[PAD302]"},
        token | {"id": 305, "content": "<tool>", "special": True},
        token | {"id": 310, "content": "<beyond>"},
    ]
    described["model"]["vocab"] |= {one["content"]: one["id"] for one in described["added_tokens"]}
    folder = as_folder(Tokenizer.from_str(json.dumps(described)), tmp_path / "tokenizer", bos_token="<s>")
    file = write_alone(folder, tmp_path / "model.gguf", 308)
    keys = said(file)
    filled = ["[PAD302]", "[PAD301]", "[[PAD302]]", "[PAD303]", "[PAD304]", "<tool>", "[PAD306]", "[PAD307]"]
    assert keys["tokenizer.ggml.tokens"][300:] == filled
    assert keys["tokenizer.ggml.token_type"][300:] == [4, 5, 5, 5, 5, 3, 5, 5]
    back = tokenizer_reader.read(file)
    assert back("a<tool>[PAD302][PAD301]")["input_ids"][1:3] == [305, 300]
    assert len(back) == 302 and back.bos_token == "<s>" and back.eos_token is None


def test_what_a_tokenizer_has_besides(byte_tokenizer, tmp_path):
    folder = tmp_path / "tokenizer"
    byte_tokenizer.save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.chat_template = {"default": "{{ messages }}", "tools": "{{ tools }}"}
    tokenizer.save_pretrained(folder)
    back = tokenizer_reader.read(write_alone(folder, tmp_path / "model.gguf", 300))
    assert back.chat_template == tokenizer.chat_template
    assert (back.bos_token_id, back.eos_token_id, back.unk_token) == (0, 1, None)
    assert back.decode(back("one <s> two  ")["input_ids"]) == "one <s> two  "
    assert back.decode(back("one<s>")["input_ids"], skip_special_tokens=True) == "one"


def changed(described: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    *places, last = path.split("/")
    inner = described
    for place in places:
        inner = inner[int(place) if place.isdigit() else place]
    inner[last] = value
    return described


TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}] * 2 + [{"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
    "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
}


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        (
            "normalizer",
            {"type": "Lowercase"},
            r"leaves the characters .* changes them first \(Lowercase\); the",
        ),
        ("pre_tokenizer/add_prefix_space", True, "puts no space before a text that it splits into bytes"),
        ("pre_tokenizer/use_regex", False, "no name for a tokenizer that splits by nothing; the file"),
        ("added_tokens/0/lstrip", True, "finds '<s>' wherever it is in a text"),
        (
            "post_processor",
            TEMPLATE,
            r"at most one token before a text .* makes \['<s>', '<s>', 'a'\] of 'a'",
        ),
        ("model/end_of_word_suffix", "</w>", "no marks at the ends of words"),
        ("model/merges", [], "loads no BPE without merges"),
        (
            "pre_tokenizer",
            {"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}, {"type": "ByteLevel"}]},
            r"no name for how this tokenizer splits a text \(Whitespace, ByteLevel\)",
        ),
    ],
)
def test_byte_level_tokenizers_that_llama_cpp_would_not_follow(
    path, value, sentence, byte_tokenizer, tmp_path
):
    described = json.loads(byte_tokenizer.backend_tokenizer.to_str())
    if path == "pre_tokenizer":
        value["pretokenizers"][1] = described["pre_tokenizer"]
    described = changed(described, path, value)
    folder = as_folder(Tokenizer.from_str(json.dumps(described)), tmp_path / "tokenizer", bos_token="<s>")
    assert re.search(sentence, why_not(folder))
    file = write_alone(folder, tmp_path / "model.gguf", 300)
    assert said(file) == {"tokenizer.ggml.model": "none"}


RUNS = ["aa a", "bb b", "a aa", "b bb", "a a", "b b"]  # of two characters, in turns


def test_runs_of_several_characters_may_share_a_place(tmp_path):
    folder = folder_of(hand_made(RUNS), tmp_path / "tokenizer")
    assert why_not(folder) is None
    keys = said(write_alone(folder, tmp_path / "model.gguf", 267))
    scores = dict(zip(keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.scores"], strict=True))
    assert {one: scores[one] for one in ("aaa", "bbb", "aa", "bb")} == {
        "aaa": 0,
        "bbb": 0,
        "aa": -1,
        "bb": -2,
    }
    back = tokenizer_reader.read(tmp_path / "model.gguf")
    assert back.tokenize("aaaabbaaabbbb") == ["aaa", "a", "bb", "aaa", "bbb", "b"]


@pytest.mark.parametrize(
    ("merges", "changes", "sentence"),
    [
        (["b c", "a b", "ab c"], {}, "only those of its list of merges; the file"),
        (["b c", "ab c", "a b", "a bc"], {}, "only those of its list of merges; the file"),
        (["aaa bbb", *RUNS], {}, "only those of its list of merges; the file"),
        (["a aa", "bb b", "aa a", "b bb", "a a", "b b"], {}, "only those of its list of merges; the file"),
        (["a b"], {"model": {"byte_fallback": False}}, "spells unknown characters in bytes, and this"),
        (["a b"], {"normalizer": None}, r"no name for how this tokenizer splits a text \(not at all\)"),
        (["a b"], {"normalizer": {"type": "NFKC"}}, r"splits a text \(NFKC\)"),
        (["a b"], {"pre_tokenizer": {"type": "Whitespace"}}, r"splits a text \(Replace, Whitespace\)"),
    ],
)
def test_sentencepiece_that_llama_cpp_would_not_follow(merges, changes, sentence, tmp_path):
    folder = folder_of(hand_made(merges, **changes), tmp_path / "tokenizer")
    assert re.search(sentence, why_not(folder))


def test_folders_without_a_tokenizer_and_other_kinds(tmp_path):
    assert (
        why_not(tmp_path) == f"{tmp_path.name} holds no tokenizer; put tokenizer.json of the model into it."
    )
    words = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    folder = as_folder(words, tmp_path / "words", unk_token="[UNK]")
    assert why_not(folder).startswith(
        "A GGUF file of this project takes a BPE tokenizer, and this one is WordPiece;"
    )


@pytest.mark.parametrize(
    ("others", "sentence"),
    [
        (
            {"model": "bert"},
            r"^model.gguf holds a tokenizer of kind 'bert', and gpt2 and llama are read here; give",
        ),
        ({"model": None}, r"^model.gguf holds a tokenizer of kind 'none'"),
        (
            {"pre": "deepseek-llm"},
            r"^model.gguf splits text as llama.cpp's 'deepseek-llm' does, which is not known",
        ),
        ({"pre": None}, r"^model.gguf splits text as llama.cpp's 'default' does, which is not known"),
        ({"merges": None}, r"^model.gguf holds no merges; give the whole file\.$"),
        ({"tokens": None}, r"^model.gguf holds no tokens; give the whole file\.$"),
        ({"model": "llama"}, r"^model.gguf holds no scores of its tokens; give the whole file\.$"),
        (
            {"add_bos_token": True, "bos_token_id": None},
            r"^model.gguf says that texts get a bos token, and not",
        ),
    ],
)
def test_files_that_are_not_understood_are_refused(others, sentence, byte_tokenizer, tmp_path):
    byte_tokenizer.save_pretrained(tmp_path / "tokenizer")
    file = write_alone(tmp_path / "tokenizer", tmp_path / "model.gguf", 300, **others)
    with pytest.raises(GGUFError, match=sentence):
        tokenizer_reader.read(file)


def swallowing(described: dict[str, Any], **others: bool) -> dict[str, Any]:
    """Special tokens as in Phi-3: they take the spaces after them, but for three. others: by another rule."""
    backend = Tokenizer.from_str(json.dumps(described))
    backend.add_special_tokens(
        [AddedToken(one, normalized=False) for one in ("<|endoftext|>", "<|user|>", "<|end|>")]
    )
    described = json.loads(backend.to_str())
    for token in described["added_tokens"]:
        token["rstrip"] = token["content"] not in ("<unk>", "<s>", "<|endoftext|>")
        token |= {"rstrip": others.get(token["content"], token["rstrip"])}
    return described


CHAT = ["<|user|>\nHello there<|end|>\n<|end|>  \t x", "a <|end|>", "<|endoftext|> a</s> b <s>\n c<think> d"]


@pytest.mark.embedded
@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize(
    ("name", "stored"),
    [
        ("my-assistant", "my-assistant (Phi-3)"),
        ("Phi-3-mini", "Phi-3-mini"),
        ("a-PHI3", "a-PHI3"),
    ],
)
def test_special_tokens_of_a_phi_3_swallow_spaces_whatever_its_name(name, stored, prefix, written, llama_cpp):
    """As llama.cpp has it, which goes by the name of the model."""
    backend = Tokenizer.from_str(json.dumps(swallowing(json.loads(sentencepiece()))))
    if prefix:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), backend.normalizer])
    tokenizer, file = written(backend, unk_token="<unk>", name=name)
    assert name_in(file) == stored
    assert tokenizer.tokenize("<|user|>\n a")[1:] == [f"{SPACE}a" if prefix else "a"]
    lines = [*CHAT, *ODD, *AROUND]
    assert different(tokenizer, llama_cpp(file), lines) == []
    assert different(tokenizer, tokenizer_reader.read(file), lines) == []


@pytest.mark.embedded
@pytest.mark.parametrize(
    ("name", "stored"),
    [
        ("finetuned-phi-3-mini", "finetuned-phi 3-mini"),
        ("PHI3", "PHI 3"),
        ("phi-2", "phi-2"),
        ("tiny", "tiny"),
    ],
)
def test_no_other_special_tokens_do_whatever_the_name_of_the_model(name, stored, written, llama_cpp):
    """llama.cpp does not load a file with "phi-3" in its name and without the tokens of Phi-3."""
    tokenizer, file = written(splitting(EXACT[0]), name=name)
    assert name_in(file) == stored
    lines = [*ODD, *AROUND]
    assert different(tokenizer, llama_cpp(file), lines) == []
    assert different(tokenizer, tokenizer_reader.read(file), lines) == []


@pytest.mark.embedded
def test_a_file_that_llama_cpp_does_not_load_is_refused_in_its_words(written, monkeypatch):
    """A name without the tokens that it stands for, in a folder of which nobody noted how it was written."""
    pytest.importorskip("xllamacpp")
    monkeypatch.setattr(tokenizer_writer, "named", lambda name, swallows: name)
    _, file = written(splitting(EXACT[0]), name="phi-3")
    with pytest.raises(RuntimeRefused, match=r"cannot load .*vocabulary.*; if it was changed, remove it"):
        LlamaCpp(file.parent, 1)


@pytest.mark.parametrize(
    ("others", "sentence"),
    [
        (
            {"<s>": True},
            "leaves the spaces after '<s>' where other .* and this tokenizer takes them; the file",
        ),
        (
            {"<|user|>": False},
            r"takes the spaces after '<\|user\|>' where other .* this tokenizer leaves them;",
        ),
        ({}, None),
    ],
)
def test_other_tokens_that_swallow_spaces_are_refused(others, sentence, tmp_path):
    folder = folder_of(swallowing(hand_made(["a b"]), **others), tmp_path / "tokenizer")
    reason = why_not(folder)
    assert reason is None if sentence is None else re.search(sentence, reason)


def test_swallowed_spaces_without_the_tokens_of_phi_3_are_refused(tmp_path):
    """llama.cpp looks for them in every file that has its name."""
    described = hand_made(["a b"])
    described["added_tokens"][2]["rstrip"] = True
    assert re.search(
        r"only where there is a token '<\|endoftext\|>', which this tokenizer does not have",
        why_not(folder_of(described, tmp_path / "tokenizer")),
    )


@pytest.mark.parametrize(("stated", "number"), [([1, 106], 1), (7, 7), ([], None), (None, None)])
def test_the_end_of_a_text_that_the_configuration_alone_knows(stated, number, tmp_path):
    """A list, as in Gemma 3, names the end of a text first and that of a turn after it."""
    folder = tmp_path / "tokenizer"
    as_folder(Tokenizer.from_str(json.dumps(hand_made(["a b"]))), folder, unk_token="<unk>")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": stated}))
    keys = said(write_alone(folder, tmp_path / "model.gguf", 264))
    assert keys.get("tokenizer.ggml.eos_token_id") == number
