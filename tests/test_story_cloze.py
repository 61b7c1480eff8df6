"""The story cloze and samples, with a session that reads by rule and with the tiny model."""

from types import SimpleNamespace

import pytest
import torch

from edgelab import tasks
from edgelab.measure import MEASUREMENTS, Asked
from edgelab.measure.sample import write
from edgelab.measure.story_cloze import answers
from edgelab.model.finite import NotFiniteError
from edgelab.runtimes.eager import Eager
from edgelab.tasks import Cloze, Story
from tests.letters import Letters


class Counting:
    """A session that keeps what it read, and after anything gives byte b the log-probability -b / 100, nearly."""

    model, vocabulary = None, 300

    def __init__(self, says=b""):
        self.read, self.asked, self.says = [], [], list(says)

    def prefill(self, ids):
        self.read = list(ids)
        return self.says[0]

    def decode(self, token):
        self.read.append(token)
        return self.says[self.says.index(token) + 1]

    def logits(self, ids):
        self.read = []
        return self.extend(ids)

    def extend(self, ids):
        self.read += ids
        return -torch.arange(256).expand(len(ids), -1) / 100

    def continuations(self, candidates):
        self.asked.append((bytes(self.read).decode(), [bytes(one).decode() for one in candidates]))
        likely = (-torch.arange(256) / 100).log_softmax(-1)
        return [likely[one] for one in candidates]


def test_logits_that_are_nan_answer_nothing():
    class Broken(Counting):
        def extend(self, ids):
            return super().extend(ids) * float("nan")

    story = Story("z", (Cloze("c", ("d",)),))
    with pytest.raises(
        NotFiniteError, match="NaN or infinity in place of logits in the story that begins 'z'"
    ):
        list(answers(Broken(), Letters(), story))


def test_the_likeliest_by_byte_is_the_answer_and_the_true_one_is_read_on():
    story = Story("z", (Cloze("aaaa", ("b",)), Cloze("c"), Cloze("e", ("d", "f")), Cloze("b", ("é", "zz"))))
    session = Counting()
    # By its sum "aaaa" would lose to "b".
    assert list(answers(session, Letters(), story)) == [True, False, True]
    assert session.asked == [("z", ["b"]), ("zaaaac", ["d", "f"]), ("zaaaace", ["é", "zz"])]
    assert bytes(session.read).decode() == "zaaaaceb"


def test_a_row_of_the_story_cloze(monkeypatch):
    stories = [
        Story("z", (Cloze("a", ("b",)), Cloze("c"))),
        Story("y", (Cloze("b", ("a",)), Cloze("a", ("b",)))),
    ]
    monkeypatch.setattr(tasks, "story_cloze", lambda text: stories)
    monkeypatch.setattr("edgelab.corpora.load", lambda corpus: {"text": [corpus]})
    progress = []
    subject = SimpleNamespace(
        asked=Asked(baseline={"story_cloze_right": "0 11"}),
        session=Counting(),
        tokenizer=Letters(),
        report=lambda done, total: progress.append((done, total)),
    )
    found = MEASUREMENTS["story_cloze"].run(subject)
    assert (found["story_cloze"], found["story_cloze_right"], found["story_cloze_items"]) == (
        2 / 3,
        "1 01",
        3,
    )
    assert (found["story_cloze_lost"], found["story_cloze_won"], found["delta_story_cloze"]) == (1, 1, 0)
    assert progress == [(1, 2), (2, 2)]
    subject.asked = Asked(baseline={"ppl": 20.0})  # of an older row, without answers
    assert "delta_story_cloze" not in MEASUREMENTS["story_cloze"].run(subject)


def test_a_story_read_in_pieces_is_answered_as_when_read_anew(variant, byte_tokenizer):
    """On the tiny model: each sentence scored by a pass of its own over all that precedes it."""
    session = Eager(variant("none"))
    beginning = "The keeper counted ships."
    places = (
        Cloze(" He saw three.", (" He saw ten of them.", " The gulls knew.", " It rained.")),
        Cloze("\n“None!”", ("\n“Où ?”", "\nOne.", "\nEvery evening.")),
    )
    found = list(answers(session, byte_tokenizer, Story(beginning, places)))
    expected, read = [], beginning
    for place in places:
        scores = []
        for sentence in (place.true, *place.false):
            ids, more = (byte_tokenizer(text)["input_ids"] for text in (read, sentence))
            with torch.no_grad():
                likely = session.model(torch.tensor([ids + more])).logits[0].log_softmax(-1)
            total = sum(float(likely[len(ids) + i - 1, token]) for i, token in enumerate(more))
            scores.append(total / len(sentence.encode()))
        expected.append(scores[0] == max(scores))
        read += place.true
    assert found == expected


def test_writing_is_greedy_and_stops():
    session = Counting(b"tea\0x")
    assert write(session, Letters(), "I like ") == "tea"
    assert bytes(session.read) == b"I like tea"
    assert write(Counting(b"tea\0x"), Letters(), "I like ", tokens=2) == "te"


def test_a_row_of_samples():
    subject = SimpleNamespace(
        session=Counting(b"tea\0"), tokenizer=Letters(), report=lambda done, total: None
    )
    assert MEASUREMENTS["sample"].run(subject) == {"sample": ["tea"] * len(tasks.PROMPTS)}
    assert len(tasks.PROMPTS) == 3
