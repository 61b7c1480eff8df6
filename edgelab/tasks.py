"""Labelled tasks made from plain texts: the last word of a sentence, the next sentence of a story, and prompts.

Both are read off a text by rules, so that they need no download, and every recipe answers the same items.
"""

from __future__ import annotations

import hashlib
import json
import re
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgelab import assets

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from edgelab.corpora import TokenizedText
    from edgelab.measure.perplexity import Window

PROMPTS = (
    "The three things that a good engineer checks first are",
    "Once upon a time, a small robot lived in a lighthouse.",
    "Q: Why is the sky blue?\nA: Because",
)
NEW_TOKENS = 40

ITEMS, ITEMS_FAST = 640, 40
FALSE = 3  # sentences from other stories for each true one
STORY_END = "<|endoftext|>"
MIN_WORDS = (
    5  # a shorter sentence, "Early life." for one, is a heading or says too little to be told from others
)
NEAREST = 24  # sentences of most similar length, among which the false ones are chosen

_STOP = re.compile(r"""[.!?…]+["'”’»)\]]*(?=\s|$)""")
_ABBREVIATION = re.compile(
    "Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|Gen|Col|Capt|Lt|Sgt|Rev|Hon|Gov|Sen|Rep|Inc|Ltd|Co|Corp|No|Nos|vol|pp|cf|ca|"
    "approx|vs|etc|al|fig|Fig|Mt|Ave|Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sep|Sept|Oct|Nov|Dec"
)
_WORD = r"[^\W\d_]\w*(?:['’-]\w+)*"
_LAST_WORD = re.compile(rf"""(?<![^\s("“‘'«\[—–])({_WORD})["'”’»)\]]*[.!?…]+["'”’»)\]]*$""")


@dataclass(frozen=True)
class Sentence:
    """Characters `begin` to `end - 1` of a text."""

    begin: int
    end: int


def sentences(text: str) -> list[Sentence]:
    """The sentences of a text, in order.

    A sentence lies within one line and ends with a full stop, question mark, exclamation mark or ellipsis, with the
    quotes and brackets that close there, before white space. It does not end where a small letter follows (`"Who?"
    he asked`), nor, within its line, after an abbreviation, a single letter, a word with full stops inside (Mr. J.
    U.S.) or a number that begins it (the marker of a list). What a line holds after its last sentence, such as a
    heading without full stop, is none.
    """
    found = []
    for line in re.finditer(r"[^\n]+", text):
        begin, end = line.span()
        begin += len(line[0]) - len(line[0].lstrip())
        for stop in _STOP.finditer(text, begin, end):
            rest = text[stop.end() : end].lstrip()
            if rest and (rest[0].islower() or _goes_on(text[begin : stop.start()], stop[0])):
                continue
            found.append(Sentence(begin, stop.end()))
            begin = end - len(rest)
    return found


def _goes_on(sentence: str, stop: str) -> bool:
    """Whether the full stop behind these words ends no sentence."""
    if not stop.startswith(".") or stop.startswith(".."):
        return False
    word = re.search(r"[^\s(\[\"“‘'«]*$", sentence)[0]
    marker = word == sentence and word.isdigit()
    letter = len(word) == 1 and word.isalpha()
    return marker or letter or "." in word or _ABBREVIATION.fullmatch(word) is not None


@dataclass(frozen=True)
class LastWord:
    """The last word of a sentence: the scored tokens `first` to `last - 1` of a window hold it."""

    window: int
    first: int
    last: int
    word: str


def last_words(text: TokenizedText, cut: list[Window]) -> list[LastWord]:
    """The last word of every sentence of at least MIN_WORDS words that ends in a scored part, in order.

    A word begins with a letter and may hold hyphens and apostrophes: a number is none. All its tokens lie in the
    scored part of one window, and the last of them ends with the word; the first one may begin with the space or
    bracket before it. The sentence itself may begin before the window.
    """
    ends = text.ends.tolist()
    firsts = [window.first for window in cut]
    line_end = text.text.find("\n", ends[cut[-1].first + cut[-1].scored - 1])
    found = []
    for sentence in sentences(text.text if line_end < 0 else text.text[:line_end]):
        words = text.text[sentence.begin : sentence.end]
        match = _LAST_WORD.search(words)
        if match is None or len(words.split()) < MIN_WORDS:
            continue
        begin, end = (sentence.begin + mark for mark in match.span(1))
        first, last = bisect_right(ends, begin), bisect_right(ends, end)  # the tokens that hold it
        index = bisect_right(firsts, first) - 1
        if index < 0 or ends[last - 1] != end or last > firsts[index] + cut[index].scored:
            continue
        found.append(LastWord(index, first - firsts[index], last - firsts[index], match[1]))
    return found


REQUESTS, REQUESTS_FAST = 480, 36
REQUEST_CHARACTERS = 300  # of a text before the word
REQUEST_TOKENS = 6  # of an answer
_OF_A_WORD = r"\w’'-"  # characters that a word may go on with


@dataclass(frozen=True)
class Request:
    """A beginning of a sentence, to be gone on with, and the word that comes next: the last of the sentence.

    tokens: of the answer, at most. stop: a text that ends an answer and is no part of it; empty for none.
    """

    prompt: str
    word: str
    tokens: int = REQUEST_TOKENS
    stop: str = ""

    def is_right(self, written: str) -> bool:
        """Whether what was written begins with the word."""
        return re.match(rf"\s*{re.escape(self.word)}(?![{_OF_A_WORD}])", written) is not None

    def is_decided(self, written: str) -> bool:
        """Whether the first word has ended, so that what is written from here on changes nothing; never without a word.

        A text that begins with no word is wrong already.
        """
        ended = rf"\s*(?:[{_OF_A_WORD}]+[^{_OF_A_WORD}]|[^\s{_OF_A_WORD}])"
        return bool(self.word) and re.match(ended, written.rstrip("\ufffd")) is not None


def requests(text: str, limit: int | None = None) -> list[Request]:
    """The first sentences of a text without their last words, each with what stands before it. 480, 36 in fast mode.

    A word is as in `last_words`. A prompt begins with a word, at most REQUEST_CHARACTERS before the one that is asked.
    """
    limit = limit or (REQUESTS_FAST if assets.fast() else REQUESTS)
    found = []
    for sentence in sentences(text):
        words = text[sentence.begin : sentence.end]
        match = _LAST_WORD.search(words)
        if match is None or len(words.split()) < MIN_WORDS:
            continue
        end = sentence.begin + match.start(1)
        begin = max(end - REQUEST_CHARACTERS, 0)
        begin = text.find(" ", begin) + 1 if begin else 0
        found.append(Request(text[begin:end].rstrip(), match[1]))
        if len(found) == limit:
            break
    return found


@dataclass(frozen=True)
class Cloze:
    """The next sentence of a story and three from other stories, each with the white space before it.

    Without false ones it is no item, only read.
    """

    true: str
    false: tuple[str, ...] = ()


@dataclass(frozen=True)
class Story:
    """A beginning, and the sentences after it in order."""

    beginning: str
    places: tuple[Cloze, ...]

    @property
    def items(self) -> list[Cloze]:
        return [place for place in self.places if place.false]


def story_cloze(text: str, limit: int | None = None) -> list[Story]:
    """Stories with items: which of four sentences comes next?

    Stories end with STORY_END. Of each, every sentence of at least MIN_WORDS words but the first is an item. The three
    false ones come from other stories, where they are not the first either: of the NEAREST of most similar length, so
    that length does not give the true one away, those that share most of their words with the whole story, so that
    its names and things do not either. No sentence occurs twice among the four, and none of the story itself is among
    the false. Nothing is drawn: items are the same for every recipe. Whole stories are taken until there are `limit`
    items (640, or 40 in fast mode).
    """
    limit = limit or (ITEMS_FAST if assets.fast() else ITEMS)
    told = [story for story in map(_pieces, text.split(STORY_END)) if len(story) > 1]
    own = [{piece.strip() for piece in story} for story in told]
    pool = sorted({piece.strip() for story in told for piece in story[1:] if _long(piece)}, key=_by_length)
    stories: list[Story] = []
    for story, sentences_of in zip(told, own, strict=True):
        if sum(len(one.items) for one in stories) >= limit:
            break
        places = []
        for piece in story[1:]:
            sentence = piece.strip()
            space = piece[: len(piece) - len(sentence)]
            false = _tempting(sentence, pool, sentences_of) if _long(piece) else []
            places.append(Cloze(piece, tuple(space + other for other in false)))
        stories.append(Story(story[0], tuple(places)))
    return stories


def _pieces(story: str) -> list[str]:
    """A story cut after each sentence; every piece but the first begins with the white space before it."""
    story = story.strip()
    ends = [sentence.end for sentence in sentences(story)]
    return [story[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]


def _long(piece: str) -> bool:
    return len(piece.split()) >= MIN_WORDS


def _by_length(sentence: str) -> tuple[int, str]:
    return len(sentence.encode()), sentence


def _tempting(sentence: str, pool: list[str], own: set[str]) -> list[str]:
    """The false sentences for a true one, from a pool sorted by length; none where there are too few.

    own: the sentences of the story.
    """
    length, place = len(sentence.encode()), bisect_left(pool, _by_length(sentence), key=_by_length)
    around = [other for other in pool[max(place - 2 * NEAREST, 0) : place + 2 * NEAREST] if other not in own]
    near = sorted(around, key=lambda other: abs(len(other.encode()) - length))[:NEAREST]
    told = set().union(*map(_words, own))
    best = sorted(near, key=lambda other: -len(_words(other) & told) / len(_words(other)))[:FALSE]
    return best if len(best) == FALSE else []


def _words(sentence: str) -> set[str]:
    return set(re.findall(r"\w+", sentence.lower()))


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Tokens of a sequence that begins with a prompt."""
    return opening(tokenizer) + tokenizer(prompt, add_special_tokens=False)["input_ids"]


TURN_ENDS = ("<end_of_turn>", "<|im_end|>", "<|end|>", "<|eot_id|>", "<|eom_id|>", "<turn|>")


def endings(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that end an answer: the one of the tokenizer, and those that end a turn of a conversation.

    A model that was taught to talk ends its turn with one of these (Gemma, Qwen, Phi-3, Llama 3), and its tokenizer may
    call another one its end. llama.cpp knows them by their texts, too.
    """
    added = tokenizer.added_tokens_encoder
    ends = {tokenizer.eos_token_id, *(added.get(text) for text in TURN_ENDS)}
    return frozenset(ends - {None})


def opening(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What a sequence begins with: the BOS token where the tokenizer itself puts one, else nothing."""
    return [token for token in tokenizer("")["input_ids"][:1] if token == tokenizer.bos_token_id]


def vocabulary_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """16 hexadecimal digits that two tokenizers share where they give the same ids to the same tokens.

    The beginning of the SHA-256 of the sorted pairs (token, id) in JSON. Every call reads the whole vocabulary.
    """
    pairs = json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(pairs.encode()).hexdigest()[:16]
