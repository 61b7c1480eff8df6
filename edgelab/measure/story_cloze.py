"""Story cloze: which of four sentences is the true next one of a story, by log-probability per byte.

A story is read once: at each sentence the false ones are scored after what was read and taken back, and the true one
is scored and stays. Scores are divided by the bytes of the sentence because a plain sum favours the shortest of the
four, whatever it says (arXiv:2404.10136), and by bytes rather than tokens because a tokenizer has nothing to do with
the question.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch

from edgelab import corpora, tasks
from edgelab.measure import Subject, measurement
from edgelab.measure.intervals import accuracy
from edgelab.model.finite import NotFiniteError
from edgelab.model.logits import SLICE, prepacked
from edgelab.storage.layers import dequantized

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedTokenizerBase

    from edgelab.runtimes.session import Session

CORPUS = "stories"


@measurement(
    "story_cloze",
    part="tasks",
    needs="session",
    fields=(
        "story_cloze",
        "story_cloze_items",
        "story_cloze_right",
        "delta_story_cloze",
        "delta_story_cloze_low",
        "delta_story_cloze_high",
        "story_cloze_lost",
        "story_cloze_won",
    ),
)
def story_cloze(subject: Subject) -> dict[str, Any]:
    """Accuracy of a variant on the story cloze, and the paired difference to the baseline's, story by story."""
    stories = tasks.story_cloze(corpora.read(CORPUS))
    session, right = subject.session, []
    with ExitStack() as stack:
        if session.model is not None:
            stack.enter_context(dequantized(session.model))
            stack.enter_context(prepacked(session.model, SLICE))
        for story in stories:
            right.append(list(answers(session, subject.tokenizer, story)))
            subject.report(len(right), len(stories))
    return accuracy("story_cloze", right, (subject.asked.baseline or {}).get("story_cloze_right"))


def answers(session: Session, tokenizer: PreTrainedTokenizerBase, story: tasks.Story) -> Iterator[bool]:
    """Read a story and say at each item whether the true sentence has the highest log-probability per byte."""

    def tokens(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    logits = session.logits(tasks.opening(tokenizer) + tokens(story.beginning))  # (time, vocabulary)
    for place in story.places:
        false = session.continuations([tokens(sentence) for sentence in place.false]) if place.false else []
        true = tokens(place.true)
        before, logits = logits[-1:], session.extend(true)
        if place.false:
            likely = torch.cat([before, logits[:-1]]).log_softmax(-1)[range(len(true)), true]
            if not likely.isfinite().all():
                raise NotFiniteError(
                    f"NaN or infinity in place of logits in the story that begins '{story.beginning[:40]}'; "
                    "measure perplexity, which names the layer where it begins."
                )
            scores = [
                float(each.sum()) / len(sentence.encode())
                for each, sentence in zip(false, place.false, strict=True)
            ]
            yield float(likely.sum()) / len(place.true.encode()) > max(scores)
