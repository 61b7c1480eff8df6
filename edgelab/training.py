"""The one training loop, and the losses of a language model, computed without all logits at once.

cross-entropy   -log p[next token]                        gradient by the logits: p - onehot(next token)
divergence      sum r (log r - log p), r the reference's  gradient by the logits: p - r

Both gradients are known as soon as a slice of logits is, so that they are taken to the hidden states slice by slice and
a tensor of positions x vocabulary never exists.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from edgelab import assets, corpora
from edgelab.model.blocks import longest
from edgelab.model.logits import head_logits, head_parameters, hidden_states
from edgelab.recipes import Context, RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SLICE = 128  # positions whose logits exist at once: 25 MB in float32 at a vocabulary of 49,152
FAST_STEPS = 4
FAST_SECONDS = 20.0
BETAS = (0.9, 0.95)  # a run of a hundred steps has no use for a memory of a thousand

Loss = Callable[[PreTrainedModel, Tensor], Tensor]  # model, token ids (batch, time) -> scalar
Score = Callable[
    [Tensor, slice], tuple[Tensor, Tensor]
]  # logits, positions -> loss of each, gradient of logits


class TrainingError(RecipeError):
    """Settings that nothing can be trained with, too little text, or a run that diverges."""


def next_token_score(targets: Tensor, logits: Tensor, where: slice) -> tuple[Tensor, Tensor]:
    """Cross-entropy of positions `where` in nats, (positions,), and its gradient by their logits.

    targets: (all positions,) int64. logits: (positions, vocabulary) float32.
    """
    log_p = torch.log_softmax(logits, -1)
    index = targets[where, None]
    loss = -log_p.gather(-1, index)[:, 0]
    return loss, log_p.exp_().scatter_add_(-1, index, torch.full_like(index, -1.0, dtype=log_p.dtype))


def divergence_score(
    reference: Callable[[slice], Tensor], logits: Tensor, where: slice
) -> tuple[Tensor, Tensor]:
    """KL(reference || model) of positions `where` in nats, (positions,), and its gradient by their logits.

    reference: gives the reference's logits of positions. logits: (positions, vocabulary) float32.
    """
    log_p = torch.log_softmax(logits, -1)
    log_r = torch.log_softmax(reference(where), -1)
    r = log_r.exp()
    loss = log_r.sub_(log_p).mul_(r).sum(-1)  # no vecdot, which autocast would take in bfloat16
    return loss, log_p.exp_().sub_(r)


class _Sliced(torch.autograd.Function):
    """Mean of a score over positions. The backward pass only scales what the forward pass has found."""

    @staticmethod
    def forward(ctx, head: Callable[[Tensor], Tensor], score: Score, hidden: Tensor, *weights: Tensor):
        total = hidden.new_zeros((), dtype=torch.float32)
        gradients = [torch.zeros_like(tensor) for tensor in (hidden, *weights)]
        for first in range(0, len(hidden), SLICE):
            where = slice(first, first + SLICE)
            part = hidden[where].detach().requires_grad_()
            with torch.enable_grad():
                logits = head(part)
            loss, gradient = score(logits.detach(), where)
            total += loss.sum()
            by_part, *by_weights = torch.autograd.grad(logits, (part, *weights), gradient)
            gradients[0][where] = by_part
            for sum_, by_weight in zip(gradients[1:], by_weights, strict=True):
                sum_ += by_weight
        ctx.save_for_backward(*gradients)
        ctx.count = len(hidden)
        return total / len(hidden)

    @staticmethod
    def backward(ctx, outer: Tensor):
        return None, None, *(gradient * (outer / ctx.count) for gradient in ctx.saved_tensors)


def _mean_score(model: PreTrainedModel, score: Score, hidden: Tensor) -> Tensor:
    weights = [weight for weight in head_parameters(model) if weight.requires_grad]
    return _Sliced.apply(partial(head_logits, model), score, hidden.flatten(0, -2), *weights)


def cross_entropy(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Mean next-token cross-entropy in nats of windows (batch, time); the first token of a window is given."""
    score = partial(next_token_score, ids[:, 1:].flatten())
    return _mean_score(model, score, hidden_states(model, ids)[:, :-1])


@dataclass(frozen=True)
class Divergence:
    """Mean KL divergence in nats to a reference that runs on the same windows, at every position."""

    reference: PreTrainedModel

    def __call__(self, model: PreTrainedModel, ids: Tensor) -> Tensor:
        with torch.no_grad():
            target = hidden_states(self.reference, ids).flatten(0, -2)

        def logits_of(where: slice) -> Tensor:
            return head_logits(self.reference, target[where])

        return _mean_score(model, partial(divergence_score, logits_of), hidden_states(model, ids))


def windows(tokenizer: PreTrainedTokenizerBase, length: int, corpus: str = "wiki/web/stories") -> Tensor:
    """Training text as windows (windows, length) int64, none across two texts.

    corpus: names of corpora with a training split, joined by a slash. Raises CorpusError for one without.
    """
    rows = []
    for name in corpus.split("/"):
        ids = corpora.tokenize(name, tokenizer, "training").ids
        rows.append(ids[: len(ids) // length * length].view(-1, length))
    return torch.cat(rows)


def batches(rows: Tensor, size: int, seed: int) -> Iterator[Tensor]:
    """Batches (size, length) of windows without end, each epoch in a new order that the seed decides."""
    if len(rows) < size:
        raise TrainingError(
            f"The training text has {len(rows)} windows, fewer than a batch of {size}; use a shorter length."
        )
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(rows), generator=generator)
        yield from rows[order[: len(rows) // size * size]].split(size)


def learning_rate_factor(done: float, warmup: float) -> float:
    """Linear warmup over the share `warmup` of a run, then half a cosine to zero. done: share of the run, 0 to 1."""
    if done < warmup:
        return done / warmup
    return 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))


def train(
    model: PreTrainedModel,
    data: Iterator[Tensor],
    loss: Loss,
    parameters: list[nn.Parameter],
    *,
    steps: int,
    seconds: float = 0.0,
    learning_rate: float = 1e-4,
    warmup: float = 0.1,
    weight_decay: float = 0.0,
    clip: float = 1.0,
    seed: int = 0,
    half: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[dict[str, float]]:
    """Train `parameters` of the model in place with AdamW; returns the curve, a point for each step.

    seconds: stops by the clock instead of after `steps` where above 0; only steps can be repeated exactly. warmup:
    share of the run. clip: largest norm of the gradient, 0 for none. half: matrix products in bfloat16. The model
    stays in its mode, train or eval. FAST shortens the run. A point is {"step", "tokens", "seconds", "loss"}, the
    loss in nats, of that batch before the step. Raises TrainingError where it is not finite.
    Loshchilov and Hutter 2019, arXiv:1711.05101.
    """
    if assets.fast():
        steps, seconds = min(steps, FAST_STEPS), min(seconds, FAST_SECONDS)
    optimizer = torch.optim.AdamW(
        parameters, lr=learning_rate, betas=BETAS, weight_decay=weight_decay, fused=True
    )
    curve: list[dict[str, float]] = []
    tokens, step, elapsed = 0, 0, 0.0
    started = time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        while step == 0 or (elapsed * (step + 1) / step <= seconds if seconds else step < steps):
            # Half a step on, so that neither the first step nor the last is lost to a rate of zero.
            done = (
                min(1.0, elapsed * (step + 0.5) / max(step, 1) / seconds) if seconds else (step + 0.5) / steps
            )
            rate = learning_rate * learning_rate_factor(done, warmup)
            for group in optimizer.param_groups:
                group["lr"] = rate
            ids = next(data)
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                value = loss(model, ids)
            if not math.isfinite(value.item()):
                raise TrainingError(
                    f"The loss is {value.item()} at step {step + 1}; use a learning_rate below {learning_rate}."
                )
            value.backward()
            if clip:
                nn.utils.clip_grad_norm_(parameters, clip)
            optimizer.step()
            optimizer.zero_grad()
            step, tokens, elapsed = step + 1, tokens + ids.numel(), time.perf_counter() - started
            curve.append({"step": step, "tokens": tokens, "seconds": elapsed, "loss": value.item()})
            progress(*((min(int(elapsed), int(seconds)), int(seconds)) if seconds else (step, steps)))
    return curve


@dataclass(frozen=True, kw_only=True)
class Trained:
    """Settings of every technique that trains.

    steps: of AdamW. minutes: stop by the clock instead, where above 0; steps give the same weights again, minutes do
    not. learning_rate: its peak. batch: windows a step. length: tokens of each. corpus: training texts, joined by a
    slash. The seed of the recipe decides the order of the windows.
    """

    kept: ClassVar[bool] = True  # as a stage: training costs

    steps: int = 80
    minutes: float = 0.0
    learning_rate: float = 1e-4
    batch: int = 4
    length: int = 256
    corpus: str = "wiki/web/stories"

    def __post_init__(self) -> None:
        if min(self.steps, self.batch) < 1 or self.length < 2:
            raise TrainingError(
                "Training needs at least 1 step of 1 window of 2 tokens, not "
                f"steps={self.steps},batch={self.batch},length={self.length}."
            )
        if not (self.learning_rate > 0 and self.minutes >= 0):
            raise TrainingError(
                f"learning_rate={self.learning_rate},minutes={self.minutes} should be above 0 and at least 0."
            )

    def fit(
        self, model: PreTrainedModel, loss: Loss, parameters: list[nn.Parameter], context: Context, half: bool
    ) -> None:
        """Train `parameters` of the model in place, and record tokens and curve. half: products in bfloat16."""
        if self.length > longest(model):
            raise TrainingError(
                f"length={self.length} is longer than the {longest(model)} tokens the model can see."
            )
        rows = windows(context.tokenizer, self.length, self.corpus)
        curve = train(
            model,
            batches(rows, self.batch, context.seed),
            loss,
            parameters,
            steps=self.steps,
            seconds=60 * self.minutes,
            learning_rate=self.learning_rate,
            seed=context.seed,
            half=half,
            progress=context.progress,
        )
        context.record.train_tokens = (context.record.train_tokens or 0) + int(curve[-1]["tokens"])
        context.record.train_corpus = self.corpus
        context.record.curve.extend(curve)
