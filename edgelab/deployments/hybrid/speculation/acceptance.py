"""Speculative decoding: a small model drafts, a large one verifies many tokens at once. The mathematics.

A round: the edge drafts g tokens, sends them, and the cloud reads all of them in one step. It accepts the first few
and adds one token of its own, so that a round gives at least one token, and what is written is what the cloud's model
alone would write: the same tokens when greedy, the same distribution when sampling.

Leviathan et al. 2023, arXiv:2211.17192; Chen et al. 2023, arXiv:2302.01318. `drafting.py` has the loop.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from edgelab.errors import EdgeLabError
from edgelab.network import Link

ID_BYTES = 4
PROBABILITY_BYTES = 2  # float16
LONGEST = 16  # tokens of a draft that a search for the best length looks at


class SpeculationError(EdgeLabError):
    """A draft, an answer to one, or figures of a round that cannot be."""


# Which tokens of a draft stay


def accept_greedy(logits: Tensor, draft: list[int]) -> tuple[int, int]:
    """How many tokens of a draft greedy decoding would have written, and the token that it writes behind them.

    logits: the target's, (draft + 1, vocabulary), before each token of the draft and after the last one. Where two
    are equal, the first one in the vocabulary is the likeliest. Raises SpeculationError for logits of another shape
    and for NaN among them.
    """
    _check_shape(logits, len(draft) + 1, "logits")
    if logits.isnan().any():
        raise SpeculationError("There is NaN among the target's logits; nothing can be verified with them.")
    likeliest = logits.argmax(-1).tolist()
    accepted = next((place for place, token in enumerate(draft) if token != likeliest[place]), len(draft))
    return accepted, likeliest[accepted]


def accept_sampled(
    target: Tensor, drafted: Tensor, draft: list[int], generator: torch.Generator
) -> tuple[int, int]:
    """How many tokens of a sampled draft stay, and the token behind them: distributed as if the target had sampled.

    target: probabilities p, (draft + 1, vocabulary), before each token of the draft and after the last one. drafted:
    probabilities q that the draft was sampled from, (draft, vocabulary). A token stays with probability min(1, p / q);
    in place of the first one that does not, one is sampled from max(0, p - q); behind a whole draft, one from p. Rows
    are normalized here in float64, so that q may have been rounded, as long as the draft was sampled from what is
    given. Raises SpeculationError for other shapes, for rows that are no probabilities, and for a token with q = 0.
    Leviathan et al. 2023, arXiv:2211.17192, algorithm 1 and appendix A.1.
    """
    p = _distributions(target, len(draft) + 1, "target")
    q = _distributions(drafted, len(draft), "drafted")
    if p.shape[1] != q.shape[1]:
        raise SpeculationError(
            f"The target has {p.shape[1]} tokens and the drafter {q.shape[1]}; both need the same vocabulary."
        )
    chances = torch.rand(len(draft), generator=generator, dtype=torch.float64).tolist()  # each in [0, 1)
    for place, (token, chance) in enumerate(zip(draft, chances, strict=True)):
        if not 0 <= token < p.shape[1]:
            raise SpeculationError(f"Token {token} of the draft is outside the vocabulary of {p.shape[1]}.")
        if (of_drafter := float(q[place, token])) == 0:
            raise SpeculationError(
                f"Token {token} of the draft has probability 0 where it was drafted; send the probabilities that it "
                "was sampled from."
            )
        if chance * of_drafter >= float(p[place, token]):
            return place, _sample(_residual(p[place], q[place]), generator)
    return len(draft), _sample(p[-1], generator)


def _residual(p: Tensor, q: Tensor) -> Tensor:
    """What the target has more of than the drafter, (vocabulary,), not normalized: max(0, p - q)."""
    left = (p - q).clamp_min(0)
    return left if left.sum() > 0 else p  # equal but for rounding


def _sample(weights: Tensor, generator: torch.Generator) -> int:
    return int(torch.multinomial(weights, 1, generator=generator))


def _check_shape(given: Tensor, rows: int, what: str) -> None:
    if given.dim() != 2 or len(given) != rows:
        raise SpeculationError(
            f"For a draft of {rows - (what != 'drafted')}, {what} should have the shape ({rows}, vocabulary), not "
            f"{tuple(given.shape)}."
        )


def _distributions(given: Tensor, rows: int, what: str) -> Tensor:
    _check_shape(given, rows, what)
    given = given.double()
    sums = given.sum(-1, keepdim=True)
    if not sums.isfinite().all() or (given < 0).any() or (sums <= 0).any():
        raise SpeculationError(
            f"A row of {what} holds no probabilities; they should be at least 0 and sum to 1."
        )
    return given / sums


def overlap(target: Tensor, drafted: Tensor) -> Tensor:
    """Probability that a sampled token is accepted, (...): the sum of min(p, q) over the vocabulary.

    target, drafted: probabilities, (..., vocabulary). Leviathan et al. 2023, section 3.2.
    """
    return torch.minimum(target, drafted).sum(-1)


# What a round gives, and what it takes


def expected_tokens(acceptance: float, draft: int) -> float:
    """Tokens of a round: (1 - a^(g+1)) / (1 - a), g + 1 where all are accepted.

    acceptance: of a token whose predecessors were accepted, the same at every place. In texts it is not: easy places
    lie together, so compare with measured tokens per round. Leviathan et al. 2023, equation 1.
    """
    _check(acceptance, draft)
    if acceptance == 1:
        return draft + 1.0
    return (1 - acceptance ** (draft + 1)) / (1 - acceptance)


def sent_bytes(draft: int, vocabulary: int = 0) -> int:
    """Bytes of a draft without framing: token ids, and for exact sampling (`vocabulary` above 0) q in float16."""
    return draft * (ID_BYTES + vocabulary * PROBABILITY_BYTES)


def travel_ms(link: Link, up_bytes: float = 0, down_bytes: float = 0) -> float:
    """Time of a round on a link: RTT + 8 up / B_up + 8 down / B_down."""
    return 1e3 * (link.up_s(up_bytes) + link.down_s(down_bytes))


def time_per_token_ms(
    acceptance: float, draft: int, draft_ms: float, verify_ms: float, travel_ms: float = 0.0
) -> float:
    """(g t_draft + t_verify + travel) / expected tokens. Without travel: co-located, both models in the cloud.

    draft_ms: the drafter's time per token; verify_ms: the target's time to read a draft; travel_ms: both ways
    together. Co-located speculation is what drafting at the edge has to beat: it sends every token once.
    """
    return (draft * draft_ms + verify_ms + travel_ms) / expected_tokens(acceptance, draft)


def break_even_round_trip_ms(
    acceptance: float,
    draft: int,
    draft_ms: float,
    verify_ms: float,
    target_ms: float,
    sending_ms: float = 0.0,
) -> float:
    """The round trip up to which drafting at the edge beats tokens that stream from the cloud; negative for never.

    target_ms: the cloud's time per token without drafts; a stream pays the round trip once. sending_ms: of the bytes
    of a round, both ways.
    """
    return target_ms * expected_tokens(acceptance, draft) - draft * draft_ms - verify_ms - sending_ms


def pipelined_ms(
    acceptance: float, draft: int, draft_ms: float, verify_ms: float, travel_ms: float = 0.0
) -> float:
    """Time per token where the edge drafts on while a draft is away, as if all of it and its own next token were right.

    away = t_verify + travel. Meanwhile the edge guesses the target's token, and drafts g more behind it: g + 1 steps.

        right, with probability a^(g+1):  max(away, (g + 1) t_draft), and the next draft is ready
        wrong:                            max(away, begun t_draft) + g t_draft, begun = min(ceil(away / t_draft), g + 1)

    because the step that is under way when the answer comes is finished. A round is never longer than without by more
    than that step, and at best shorter by its drafts, g t_draft (arXiv:2606.25091).
    """
    tokens = expected_tokens(acceptance, draft)
    away = verify_ms + travel_ms
    steps = draft + 1
    begun = math.ceil(min(away / draft_ms, steps)) if draft_ms else steps
    right = max(away, steps * draft_ms)
    wrong = max(away, begun * draft_ms) + draft * draft_ms
    hit = acceptance**steps
    return (hit * right + (1 - hit) * wrong) / tokens


def best_draft(
    acceptance: float,
    draft_ms: float,
    verify_ms: float,
    travel_ms: float = 0.0,
    pipelined: bool = False,
    longest: int = LONGEST,
) -> int:
    """The draft length of 1 to `longest` with the least time per token; the shortest of equal ones."""
    takes = pipelined_ms if pipelined else time_per_token_ms
    return min(
        range(1, longest + 1), key=lambda draft: takes(acceptance, draft, draft_ms, verify_ms, travel_ms)
    )


def capacity_clients(draft: int, draft_ms: float, verify_ms: float, travel_ms: float = 0.0) -> float:
    """Clients that one target serves at most when they draft themselves: (g t_draft + t_verify + travel) / t_verify.

    A target that drafts itself, or streams, is busy all the time and serves one client at that speed. Without travel
    this is 1 + g t_draft / t_verify; on a link, clients are away longer and more of them fit, each one slower.
    """
    _check(0.0, draft)
    if not verify_ms > 0:
        raise SpeculationError(f"verify_ms is {verify_ms} and should be above 0.")
    return (draft * draft_ms + verify_ms + travel_ms) / verify_ms


def _check(acceptance: float, draft: int) -> None:
    if not 0 <= acceptance <= 1:
        raise SpeculationError(f"An acceptance of {acceptance} is no share; it should be 0 to 1.")
    if draft < 0:
        raise SpeculationError(f"A draft of {draft} tokens cannot be; it should be 0 or more.")
