"""The edge alone: what it writes, and how sure it was of the part that counts."""

import numpy as np
import pytest
import torch

from edgelab.deployments.hybrid.answering import Edge
from edgelab.deployments.hybrid.routing.scores import answer_scores
from edgelab.tasks import Request
from tests.letters import Letters


class Says:
    """A session that writes a text, less sure with every byte of it."""

    kernel = badge = "test"

    def __init__(self, text):
        self.text, self.place = text.encode(), 0

    def prefill(self, ids):
        self.place = 0
        return self.text[0]

    def decode(self, token):
        self.place += 1
        return self.text[self.place]

    def next_logits(self):
        logits = torch.zeros(1, 256)
        logits[0, self.text[self.place]] = 9.0 - self.place
        return logits


def edge(text):
    return Edge(Says(text), Letters())


@pytest.mark.parametrize(
    ("text", "word", "judged"),
    [
        (" the end of", "the", 5),  # the space that ends the word counts: without it, it could be another one
        (" their", "the", 6),  # no end was seen
        (" “the", "the", 4),  # begins with no word; a character of three bytes is whole after the third
        (" the end of", "", 6),  # nothing is asked about a first word
    ],
)
def test_scores_are_of_the_tokens_that_are_judged(text, word, judged):
    found = edge(text).answer(Request("I saw", word))
    said = Says(text)
    logits = [said.next_logits() for said.place in range(judged)]
    assert found.tokens == 6
    assert found.scores == pytest.approx(answer_scores(np.vstack(logits), list(text.encode())[:judged]))


@pytest.mark.parametrize(
    ("written", "is_decided"),
    [
        ("", False),
        (" ", False),
        (" the", False),
        (" well-", False),
        (" well-known", False),
        (" the ", True),
        ("the.", True),
        (" the\ufffd", False),  # a part of a character, which may be of the word
        (" (", True),
        ("\n\n", False),
    ],
)
def test_an_answer_is_decided_where_its_first_word_ends(written, is_decided):
    assert Request("I saw", "the").is_decided(written) is is_decided
    assert Request("I saw", "").is_decided(written) is False
