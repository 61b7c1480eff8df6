"""Models for the tests of the server: a session with the same logits behind every token, and what a session writes."""

import torch

from edgelab.runtimes.session import Session
from tests.server.requests import PROMPT


class Fixed(Session):
    """The same logits behind every token. before: called ahead of every step."""

    kernel = "none"
    vocabulary = 6

    def __init__(self, logits=(0.0, 1.0, 2.0, 0.5, -1.0, -30.0), before=lambda: None):
        super().__init__()
        self.logits_now, self.before, self.steps = torch.tensor(logits), before, 0

    @classmethod
    def _refusal(cls, about):
        return None

    def _feed(self, ids, every):
        self.before()
        self.steps += 1
        return self.logits_now.expand(len(ids) if every else 1, -1)

    def _cut(self, length):
        return True


def greedy(session, prompt, tokens):
    written = [session.prefill(prompt)]
    while len(written) < tokens:
        written.append(session.decode(written[-1]))
    return written


def first_part_of(stage):
    """Hidden states of the prompt."""
    stage.forget()
    return stage.read(torch.tensor(PROMPT), 0)
