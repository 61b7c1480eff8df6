"""Sentences, last words and story items of small texts, read off by hand."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgelab import corpora, reference
from edgelab.corpora import TokenizedText, tokenize_text
from edgelab.measure.perplexity import Window, windows
from edgelab.measure.protocols import PROTOCOLS
from edgelab.tasks import MIN_WORDS, STORY_END, Cloze, endings, last_words, opening, sentences, story_cloze


def cut_up(text):
    return [text[one.begin : one.end] for one in sentences(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two!  Three?\nFour…", ["One.", "Two!", "Three?", "Four…"]),
        ('"Who?" he asked. "Me." She left.', ['"Who?" he asked.', '"Me."', "She left."]),
        (
            "He read “Tea”. (It was short.) Then he slept.",
            ["He read “Tea”.", "(It was short.)", "Then he slept."],
        ),
        (
            "Mr. Fox met J. Doe in the U.S. army, e.g. Ohio.",
            ["Mr. Fox met J. Doe in the U.S. army, e.g. Ohio."],
        ),
        (
            "It grew by 1.5 percent in 1990. Then it fell.",
            ["It grew by 1.5 percent in 1990.", "Then it fell."],
        ),
        ("They live in the U.S.\nSo do we.", ["They live in the U.S.", "So do we."]),
        ("1. Take the tea. 2. Drink it.", ["1. Take the tea.", "2. Drink it."]),
        ("Early life\nShe was born.\nNo full stop here", ["She was born."]),
        ("Well ... so it went... And on.", ["Well ... so it went...", "And on."]),
        ("«Où vont-ils ?» Ils partent.", ["«Où vont-ils ?»", "Ils partent."]),
        ("", []),
        (" \n \n", []),
    ],
)
def test_sentences_by_hand(text, expected):
    assert cut_up(text) == expected


@given(st.text(alphabet=st.sampled_from('ab A.!?"\n é1'), max_size=60))
def test_sentences_lie_in_order_within_lines_and_end_as_they_should(text):
    before = 0
    for one in sentences(text):
        part = text[one.begin : one.end]
        assert before <= one.begin < one.end
        assert part == part.strip() and "\n" not in part
        assert part.rstrip('"')[-1] in ".!?"
        before = one.end


def by_pieces(pieces):
    """A text of which each piece is a token."""
    ends = torch.tensor([len("".join(pieces[: i + 1])) for i in range(len(pieces))])
    return TokenizedText("text", "".join(pieces), torch.arange(len(pieces)), ends)


def window(first, scored):
    return Window(torch.zeros(scored + 1, dtype=torch.int64), first, scored)


def found(pieces, *cut):
    return [(one.window, one.first, one.last, one.word) for one in last_words(by_pieces(pieces), list(cut))]


TEA = [
    "Tea",
    " is",
    " a",
    " very",
    " hot",
    " bever",
    "age",
    ".",
    " So",
    " is",
    " all",
    " of",
    " the",
    " milk",
    ".",
]


def test_last_words_are_token_positions_within_the_scored_part():
    assert found(TEA, window(0, 15)) == [(0, 5, 7, "beverage"), (0, 13, 14, "milk")]
    assert found(TEA, window(3, 6), window(9, 6)) == [(0, 2, 4, "beverage"), (1, 4, 5, "milk")]


def test_a_word_on_the_edge_of_a_window_is_no_item():
    assert found(TEA, window(1, 5), window(6, 9)) == [(1, 7, 8, "milk")]  # "bever" in one, "age" in the other
    assert found(TEA, window(6, 3)) == []  # begins before what is scored
    assert found(TEA, window(0, 6)) == []  # goes on behind it


def test_the_full_stop_may_lie_behind_the_window():
    assert found(TEA, window(1, 6)) == [(0, 4, 6, "beverage")]


@pytest.mark.parametrize(
    ("end", "word"),
    [
        ([" say", '."'], "say"),
        ([' "', "tea", '"', "."], "tea"),
        ([" (", "tea", ")", "."], "tea"),
        ([" caf", "é", "!"], "café"),
        ([" well", "-", "known", "."], "well-known"),
        ([" don", "’t", "."], "don’t"),
        ([" 1990", "."], None),
        ([" 1990", "s", "."], None),
        ([" 5", " %", "."], None),
        ([" tea", ".\n"], None),  # the token of the full stop goes on, but not that of the word
        ([" tea."], None),  # the token of the word goes on behind it
    ],
)
def test_what_is_a_word(end, word):
    pieces = ["This", " is", " what", " people", *end]
    if end == [" tea", ".\n"]:
        word = "tea"
    assert [one.word for one in last_words(by_pieces(pieces), [window(0, len(pieces))])] == [word] * (
        word is not None
    )


def test_short_sentences_are_no_items():
    assert found(["See", " also", " the", " list", "."], window(0, 5)) == []
    assert MIN_WORDS == 5


@pytest.mark.parametrize("name", PROTOCOLS)
def test_tokens_of_an_item_are_those_of_the_word(name, story, tiny_reference):
    cut = windows(story, PROTOCOLS[name], tiny_reference.tokenizer, 4)
    items = last_words(story, cut)
    assert {one.word for one in items} >= {
        "ships",
        "breakfast",
    }  # "bed" has no full stop before a capital in one line
    for one in items:
        first = cut[one.window].first
        assert 0 <= one.first < one.last <= cut[one.window].scored
        assert story.characters(first + one.first, first + one.last).lstrip() == one.word


def test_tokens_within_a_character_belong_to_its_word(byte_tokenizer):
    text = tokenize_text("They all sat in the old café. Then it rained.", byte_tokenizer)
    (one,) = last_words(text, [window(0, len(text.ids))])
    assert one.word == "café"
    assert byte_tokenizer.decode(text.ids[one.first : one.last]).strip() == "café"


TOLD = STORY_END.join(
    "".join(
        f"{name} the {kind} was happy. {name} went to the {place} {n} times. {name} saw a {kind} there! Hi.\n"
        for n in "12"
    )
    for name, kind, place in [
        ("Tom", "cat", "park"),
        ("Lily", "dog", "lake"),
        ("Sam", "fish", "hill"),
        ("Ann", "bird", "moon"),
        ("Max", "frog", "farm"),
    ]
)


def test_items_of_a_story_by_hand():
    stories = story_cloze(TOLD)
    assert [story.beginning for story in stories] == [
        "Tom the cat was happy.",
        "Lily the dog was happy.",
        "Sam the fish was happy.",
        "Ann the bird was happy.",
        "Max the frog was happy.",
    ]
    first = stories[0]
    assert [place.true for place in first.places] == [
        " Tom went to the park 1 times.",
        " Tom saw a cat there!",
        " Hi.",
        "\nTom the cat was happy.",
        " Tom went to the park 2 times.",
        " Tom saw a cat there!",
        " Hi.",
    ]
    assert [len(place.false) for place in first.places] == [3, 3, 0, 3, 3, 3, 0]


def test_false_sentences_come_from_other_stories_and_differ():
    for story, text in zip(story_cloze(TOLD), TOLD.split(STORY_END), strict=True):
        for place in story.items:
            false = {sentence.strip() for sentence in place.false}
            assert len(false) == 3
            assert place.true in text and all(sentence in TOLD and sentence not in text for sentence in false)
            space = place.true[: len(place.true) - len(place.true.strip())]
            assert all(sentence == space + sentence.strip() for sentence in place.false)


def test_false_sentences_share_words_with_the_story():
    told = "Tom met a frog. Then the frog sang to Tom."
    others = ["Max is sad. Then the frog ran to Max.", "Ann is sad. Once the bird ran to Ann."]
    others += [
        f"{name} is sad. {name} the fish swam {to} Rome." for name, to in [("Kim", "by"), ("Lea", "to")]
    ]
    (place,) = story_cloze(STORY_END.join([told, *others]))[0].places
    assert place == Cloze(
        " Then the frog sang to Tom.",
        (" Then the frog ran to Max.", " Lea the fish swam to Rome.", " Once the bird ran to Ann."),
    )


def test_whole_stories_until_there_are_enough_items():
    assert [len(story.items) for story in story_cloze(TOLD, 6)] == [5, 5]
    assert len(story_cloze(TOLD, 5)) == 1


def test_lengths_of_the_four_are_near_where_they_can_be():
    short = "".join(f"Boy {n}. He saw the cat {n:02}.{STORY_END}" for n in range(40))
    long = "".join(
        f"Girl {n}. She went all the way to the lake with her friend number {n:02}.{STORY_END}"
        for n in range(40)
    )
    for story in story_cloze(short + long):
        for place in story.items:
            assert {len(sentence) for sentence in place.false} == {len(place.true)}


def test_a_text_without_other_stories_has_no_items():
    assert [story.items for story in story_cloze(TOLD.split(STORY_END)[0])] == [[]]
    assert story_cloze("") == []


class WithBos:
    bos_token_id = 7

    def __call__(self, text):
        return {"input_ids": [7, 8]}


def test_a_sequence_begins_as_the_tokenizer_begins_it(byte_tokenizer):
    assert opening(byte_tokenizer) == []
    assert opening(WithBos()) == [7]


@pytest.mark.embedded
def test_items_of_the_embedded_texts():
    tokenizer = reference.load_tokenizer(reference.resolve())
    text = corpora.tokenize("wiki", tokenizer)
    items = last_words(text, windows(text, PROTOCOLS["edgelab-512"], tokenizer, 32))
    assert len(items) == 416
    assert (items[0].word, items[-1].word) == ("reasons", "sound")
    stories = story_cloze("".join(corpora.load("stories")["text"]))
    assert (len(stories), sum(len(story.items) for story in stories)) == (53, 648)


def test_the_end_of_a_turn_ends_an_answer(byte_tokenizer):
    """A Gemma that was taught to talk calls <eos> its end, and ends its turns with another token."""
    assert endings(byte_tokenizer) == {1}
    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"]})
    assert endings(tokenizer) == {1, tokenizer.convert_tokens_to_ids("<end_of_turn>")}
    tokenizer.eos_token = None
    assert endings(tokenizer) == {tokenizer.convert_tokens_to_ids("<end_of_turn>")}
