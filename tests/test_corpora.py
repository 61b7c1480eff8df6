"""Texts: rows that join to the text, splits that never overlap, tokens that know their characters."""

import errno
import itertools
import re
from pathlib import Path

import datasets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgelab import assets, corpora, reference
from edgelab.corpora import SPLITS, CorpusError, load, tokenize, tokenize_text
from edgelab.errors import EdgeLabError

WIKI = '<doc id="1" title="Tea">\nTea is a drink.\n</doc>\n<doc id="2">\nA doctor <docks> 3 < 4.\n</doc>\n'


@pytest.fixture
def texts(home):
    """Small stand-ins for the embedded texts, entered in the manifest as the real ones are."""
    folder = home / "assets" / "texts"
    folder.mkdir(parents=True)
    for name in corpora.EMBEDDED:
        body = WIKI * 12_000 if name == "wiki" else "".join(f"{name} line {n}\n" for n in range(40_000))
        (folder / f"{name}.txt").write_text(body, encoding="utf-8")
    assets._record(home / "assets", [f"texts/{name}.txt" for name in corpora.EMBEDDED])
    return folder


@given(st.text(alphabet=st.sampled_from("ab\n\r\t\u2028é "), max_size=60), st.integers(0, 10**6))
def test_rows_are_lines_and_join_to_the_text(text, begin):
    rows = corpora._lines(text, begin)
    assert "".join(rows["text"]) == text
    assert all(line.count("\n") == 1 and line.endswith("\n") for line in list(rows["text"])[:-1])
    for line, start in zip(rows["text"], rows["start"], strict=True):
        assert text[start - begin : start - begin + len(line)] == line


def test_splits_of_one_text_do_not_overlap(texts):
    for corpus in {name for name, _ in SPLITS}:
        whole = corpora._embedded_text(corpus)
        used = []
        for split in [which for name, which in SPLITS if name == corpus]:
            rows = load(corpus, split)
            begin = rows["start"][0]
            text = "".join(rows["text"])
            assert whole[begin : begin + len(text)] == text
            used.append((begin, begin + len(text)))
        for (_, end), (begin, _) in itertools.pairwise(sorted(used)):
            assert end <= begin


def test_ranges_by_hand(texts):
    assert sum(map(len, load("wiki")["text"])) == 400_000
    assert load("wiki", "training")["start"][0] == 500_000
    assert sum(map(len, load("web", "calibration")["text"])) == 400_000
    assert load("web", "training")["start"][0] == 400_000
    length = len((texts / "stories.txt").read_text())
    assert load("stories", "training")["start"][0] == length // 3
    assert sum(map(len, load("stories")["text"])) == length // 3


def test_only_document_tags_are_deleted(texts):
    assert (
        "".join(load("wiki")["text"])[:59]
        == "\nTea is a drink.\n\n\nA doctor <docks> 3 < 4.\n\n\nTea is a drink"
    )


def test_a_text_file_is_for_evaluation_only(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("erste Zeile\nzweite – ohne Ende", encoding="utf-8")
    rows = load(str(path))
    assert isinstance(rows, datasets.Dataset)
    assert (list(rows["text"]), list(rows["start"])) == (["erste Zeile\n", "zweite – ohne Ende"], [0, 12])
    for split in ("training", "calibration"):
        with pytest.raises(CorpusError, match=f"for {split}; use one of w"):
            load(str(path), split)


def test_a_file_is_known_by_its_content(tmp_path, tiny_reference):
    one, other = tmp_path / "a" / "text.txt", tmp_path / "b" / "text.txt"
    for path, text in ((one, "one text"), (other, "another text")):
        path.parent.mkdir()
        path.write_text(text)
    assert (
        tokenize(str(one), tiny_reference.tokenizer).name
        != tokenize(str(other), tiny_reference.tokenizer).name
    )
    assert str(tmp_path) not in tokenize(str(one), tiny_reference.tokenizer).name


@pytest.mark.parametrize(
    ("corpus", "split", "sentence"),
    [
        (
            "wiki",
            "calibration",
            r"'wiki' is not for calibration, so that texts never overlap; .* there is web \(",
        ),
        ("web", "evaluation", r"'web' is not for evaluation, .* there is wiki \(evaluation\), stories"),
        (
            "technical",
            "training",
            r"'technical' is not for training, .* there is wiki \(training\), web \(training\), stories",
        ),
        ("technical", "calibration", "'technical' is not for calibration"),
        ("wikki", "evaluation", "There is no corpus 'wikki' for evaluation; use one of wiki, stories"),
        (
            "wikki",
            "training",
            r"for training; use one of wiki, web, stories, code, extraction, wikitext-2\.",
        ),
        ("wiki", "test", "Texts have no split 'test'; use one of evaluation, calibration, training"),
        ("", "evaluation", "There is no corpus ''"),
    ],
)
def test_refused_with_one_sentence(corpus, split, sentence):
    with pytest.raises(CorpusError, match=sentence) as caught:
        load(corpus, split)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def test_a_file_that_is_no_text(tmp_path):
    (tmp_path / "picture.txt").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(CorpusError, match=r"picture\.txt is not UTF-8 text; save it as UTF-8 first\.$"):
        load(str(tmp_path / "picture.txt"))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("Möwe".encode("utf-16"), "is not UTF-8 text; save it as UTF-8 first."),
        ("Gull".encode("utf-16-le"), "is not UTF-8 text; save it as UTF-8 first."),
        ("Gull".encode("utf-32"), "is not UTF-8 text; save it as UTF-8 first."),
        (b"GIF\0\1\2", "is not UTF-8 text; save it as UTF-8 first."),
        (b"", "is empty; give a text to evaluate on."),
        ("\ufeff \n".encode(), "is empty; give a text to evaluate on."),
    ],
)
def test_files_without_text(content, sentence, tmp_path):
    (tmp_path / "text.txt").write_bytes(content)
    with pytest.raises(CorpusError, match=rf"text\.txt {sentence}$"):
        corpora.read(str(tmp_path / "text.txt"))


def test_byte_order_marks_are_no_text(tmp_path, byte_tokenizer):
    """Also those within, where files that had one were joined."""
    (tmp_path / "text.txt").write_bytes(b"\xef\xbb\xbfOne gull.\n\xef\xbb\xbfTwo gulls.\n")
    assert corpora.read(str(tmp_path / "text.txt")) == "One gull.\nTwo gulls.\n"
    plain = byte_tokenizer("One gull.\nTwo gulls.\n", add_special_tokens=False)["input_ids"]
    assert corpora.tokenize(str(tmp_path / "text.txt"), byte_tokenizer).ids.tolist() == plain


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("One gull.")

    def refused(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "open", refused)
    monkeypatch.setattr(Path, "read_text", refused)
    for read in (corpora.read, corpora.identity):
        with pytest.raises(
            CorpusError, match=r"text\.txt cannot be read \(Permission denied\); check its perm"
        ):
            read(str(tmp_path / "text.txt"))


@pytest.mark.parametrize("use", [corpora.read, corpora.identity])
@pytest.mark.parametrize("name", ["~nosuchuser/x.txt", "a" * 300, "/tmp/" + "a" * 300, "a\0b", "/a\0b"])
def test_names_that_no_file_can_have(name, use):
    with pytest.raises(EdgeLabError) as caught:
        use(name)
    assert len(str(caught.value)) < 200 and "\n" not in str(caught.value)


def test_a_tokenizer_without_offsets():
    from transformers import ByT5Tokenizer

    with pytest.raises(
        CorpusError, match=r"^ByT5Tokenizer does not say which characters its tokens cover; give"
    ):
        corpora.tokenize_text("One gull.", ByT5Tokenizer())


def test_the_hub_without_network(monkeypatch):
    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(
        CorpusError, match=r"comes from the Hub, which cannot be reached now; use one of wiki, .* offline"
    ):
        load("wikitext-2")


def test_rows_of_the_hub_are_joined(monkeypatch):
    asked = []

    def rows(*arguments: str, split: str) -> dict[str, list[str]]:
        asked.append((*arguments, split))
        return {"text": ["", " = Title = \n", "Body.\n"]}

    monkeypatch.setattr(datasets, "load_dataset", rows)
    assert "".join(load("wikitext-2")["text"]) == " = Title = \nBody.\n"
    load("wikitext-2", "calibration")
    assert [one[-1] for one in asked] == ["test", "train"]


@given(st.text(max_size=80))
def test_tokens_know_their_characters(byte_tokenizer, text):
    tokens = tokenize_text(text, byte_tokenizer)
    assert tokens.ids.dtype == tokens.ends.dtype == torch.int64
    assert (tokens.ends.diff() >= 0).all()
    if len(tokens.ids):
        assert tokens.characters(0, len(tokens.ids)) == text
        middle = len(tokens.ids) // 2
        if middle:
            assert tokens.characters(0, middle) + tokens.characters(middle, len(tokens.ids)) == text
    else:
        assert text == ""


def test_no_special_tokens_are_added(byte_tokenizer):
    assert not {0, 1} & set(tokenize_text("Every evening", byte_tokenizer).ids.tolist())


@pytest.mark.embedded
def test_evaluation_tokens_of_the_embedded_model():
    from edgelab.measure.perplexity import PROTOCOLS, windows

    tokenizer = reference.load_tokenizer(reference.resolve())
    text = tokenize("wiki", tokenizer)
    assert len(text.text) == 400_000
    assert len(text.ids) == 99_785
    assert len(windows(text, PROTOCOLS["edgelab-512"], tokenizer)) == 194
    assert not re.search(r"</?doc\b", text.text)
    assert text.name == "wiki"


@pytest.mark.embedded
def test_splits_share_no_passages():
    """By content: no line of 100 characters or more of one split is in another one, but for two in the web text.

    Its source repeats a birth notice of 1,052 characters, and quotes a paragraph that the technical text has too.
    """
    lines = {
        place: {line.strip() for line in load(*place)["text"] if len(line.strip()) >= 100} for place in SPLITS
    }
    shared = {
        (one, other, line[:20])
        for one, other in itertools.combinations(SPLITS, 2)
        for line in lines[one] & lines[other]
    }
    assert shared == {
        (("web", "calibration"), ("web", "training"), "Seren Rayne Frank Su"),
        (("web", "calibration"), ("technical", "evaluation"), "FAISS, including its"),
    }


@pytest.mark.embedded
@pytest.mark.parametrize("corpus", ["wiki", "web", "stories"])
def test_ranges_of_the_real_texts_do_not_overlap(corpus):
    whole, last = corpora._embedded_text(corpus), 0
    for split in ("calibration", "evaluation", "training"):
        if (corpus, split) in SPLITS:
            rows = load(corpus, split)
            text = "".join(rows["text"])
            assert rows["start"][0] >= last
            last = rows["start"][0] + len(text)
            assert whole[rows["start"][0] : last] == text
    assert last == len(whole)


@pytest.mark.embedded
@pytest.mark.parametrize(
    ("corpus", "tokens"), [("wiki", 16 * 512), ("stories", 2048), ("code", 4096), ("wiki", 10**9)]
)
def test_the_beginning_of_a_text_has_the_tokens_of_the_whole(corpus, tokens):
    tokenizer = reference.load_tokenizer(reference.resolve())
    whole, beginning = corpora.tokenize(corpus, tokenizer), corpora.tokenize(corpus, tokenizer, tokens=tokens)
    count = min(tokens, len(whole.ids))
    assert torch.equal(beginning.ids[:count], whole.ids[:count])
    assert torch.equal(beginning.ends[:count], whole.ends[:count])
    assert whole.text.startswith(beginning.text) and (len(beginning.ids) < len(whole.ids)) == (tokens < 10**9)
