"""What a model writes: the greedy continuations of three fixed prompts, kept with the row.

Numbers do not show that a model repeats itself or has lost its grammar; three lines of its text do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgelab import tasks
from edgelab.corpora import check_tokens
from edgelab.measure import Subject, measurement

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from edgelab.runtimes.session import Session


@measurement("sample", part="tasks", needs="session", fields=("sample",))
def sample(subject: Subject) -> dict[str, Any]:
    """A variant's continuations of the prompts."""
    written = []
    for prompt in tasks.PROMPTS:
        written.append(write(subject.session, subject.tokenizer, prompt))
        subject.report(len(written), len(tasks.PROMPTS))
    return {"sample": written}


def write(
    session: Session, tokenizer: PreTrainedTokenizerBase, prompt: str, tokens: int = tasks.NEW_TOKENS
) -> str:
    """The text a session writes after a prompt, always the most likely token, up to the end-of-text token.

    Raises CorpusError for a prompt with a token that the model has not.
    """
    ids = tasks.prompt_ids(tokenizer, prompt)
    check_tokens(ids, session.vocabulary, tokenizer)
    written, ends = [session.prefill(ids)], tasks.endings(tokenizer)
    while len(written) < tokens and written[-1] not in ends:
        written.append(session.decode(written[-1]))
    return tokenizer.decode(written, skip_special_tokens=True)
