"""Distillation: a student is trained on all that a teacher thinks of the next token, not only on the token that came.

loss = (1 - hard) * divergence from the teacher + hard * cross-entropy
       + hidden * |states - teacher's states|**2 / |teacher's states|**2      mean over blocks and tokens
       + attention * KL(teacher's attention || student's)                     mean over blocks, heads and tokens

Block i of n looks at block round((i + 1) * N / n) - 1 of the teacher's N, so that the last two meet. Where widths
differ, a linear map from the student's states to the teacher's is trained along and left behind; where numbers of heads
differ, their mean is compared.

Hinton et al. 2015, arXiv:1503.02531; of states and attention Jiao et al. 2020 (TinyBERT), arXiv:1909.10351; on what the
student writes itself Agarwal et al. 2023 (GKD), arXiv:2306.13649.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import MISSING, dataclass, field, fields
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from edgelab.keys import key
from edgelab.model.blocks import bfloat16_is_fast, block_list
from edgelab.model.divergences import DIVERGENCES
from edgelab.model.logits import head_logits, hidden_states
from edgelab.model.losses import Divergence, Loss, Teacher, cross_entropy, live
from edgelab.model.marks import fingerprint, refuse_zeros
from edgelab.recipes import Context, Recipe, RecipeError, reads, register
from edgelab.reference import load_tokenizer, resolve
from edgelab.storage.layers import packed_layers
from edgelab.techniques.lessons import predicted, teaching, where_weights_may_move
from edgelab.training import Trained

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROMPT = 0.25  # of a window is given to the student that writes


@register("distill", shown=("loss",))
@dataclass(frozen=True, kw_only=True)
class Distill(Trained):
    """Train every weight of a student on the predictions of a teacher.

    teacher: recipe in parentheses that makes the teacher; (none) is the model before all techniques. model: folder or
    Hub id that the teacher comes from, empty for the student's own. loss: kl, reverse_kl, jsd (which vanishes at mix=0
    and 1), scaled_jsd (whose ends are kl and reverse_kl), skew_kl, skew_reverse_kl, logits (squared difference), or ce,
    the next token alone, a control without a teacher. mix: weight of the teacher in jsd and scaled_jsd, and what the
    skewed ones mix in. temperature: both distributions are softened by it. top_k: of the teacher's tokens, all others
    as one event, 0 for every token; such answers take a tenth of the disk that hidden states do. hard: share of the
    cross-entropy, 0 to 1. hidden: weight of the difference of hidden states. attention: weight of the divergence of
    attention. written: share of the windows that the student continues itself from their first quarter, 0 to 1. fresh:
    start from random weights of the student's shape, the control for what the student's weights are worth.
    """

    teacher: Recipe = field(default_factory=Recipe)
    model: str = ""
    loss: Literal["kl", "reverse_kl", "jsd", "scaled_jsd", "skew_kl", "skew_reverse_kl", "logits", "ce"] = (
        "kl"
    )
    mix: float = 0.5
    temperature: float = 1.0
    top_k: int = 0
    hard: float = 0.0
    hidden: float = 0.0
    attention: float = 0.0
    written: float = 0.0
    fresh: bool = False
    learning_rate: float = field(default=3e-4, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least, most in (("mix", 0, 1), ("hard", 0, 1), ("written", 0, 1)):
            if not least <= getattr(self, name) <= most:
                raise RecipeError(f"distill:{name}={getattr(self, name)} is outside {least} to {most}.")
        if self.loss == "jsd" and self.mix in (0, 1):
            raise RecipeError(
                f"distill:loss=jsd vanishes at mix={self.mix}; loss=scaled_jsd tends to kl and reverse_kl there."
            )
        if self.loss.startswith("skew") and self.mix == 1:
            raise RecipeError(f"distill:loss={self.loss} vanishes at mix=1; 0.1 is usual.")
        if not self.temperature > 0:
            raise RecipeError(f"distill:temperature={self.temperature} should be above 0; 1 to 4 are usual.")
        for name in ("top_k", "hidden", "attention"):
            if getattr(self, name) < 0:
                raise RecipeError(f"distill:{name}={getattr(self, name)} should be at least 0.")
        if self.teacher.deployment != Recipe().deployment:
            raise RecipeError(
                f"distill:teacher=({self.teacher}) teaches in torch; leave out what follows the @."
            )
        for name in self._without_effect():
            raise RecipeError(f"distill:loss={self.loss} makes no use of {name}; leave it out.")
        if self.hard and self.written:
            raise RecipeError(
                "distill:hard takes the next token of a text, and written has the student write it; choose one."
            )
        if self.attention and self.activation_checkpointing:
            raise RecipeError(
                "distill:attention needs the attention that activation_checkpointing forgets; choose one."
            )

    def _without_effect(self) -> list[str]:
        """Settings that differ from their defaults and that the loss does not look at."""
        idle = {
            "ce": ("teacher", "model", "hard", "hidden", "attention", "top_k", "temperature", "written"),
            "logits": ("top_k", "temperature"),
        }.get(self.loss, ())
        if not self.loss.startswith(("jsd", "scaled", "skew")):
            idle += ("mix",)
        defaults = {
            one.name: one.default_factory() if one.default is MISSING else one.default for one in fields(self)
        }
        return [name for name in idle if getattr(self, name) != defaults[name]]

    def reads(self) -> list[str]:
        """What the teacher is made of beside the student's reference, and a text file."""
        if self.loss == "ce":
            return super().reads()
        made = [f"{one.method}, version {one.version}" for one in self.teacher.techniques]
        origin = [resolve(self.model).sha] if self.model else []
        return [
            *super().reads(),
            *made,
            *origin,
            *(read for one in self.teacher.techniques for read in reads(one)),
        ]

    def apply(self, model: PreTrainedModel, context: Context) -> PreTrainedModel:
        """A copy of the student, trained; its shapes stay."""
        packed = next(iter(packed_layers(model)), None)
        if packed is not None:
            raise RecipeError(
                f"distill trains float weights, and {packed} is quantized; put it before quantizing."
            )
        if model.dtype != torch.float32:
            raise RecipeError(
                f"distill trains in float32, and the student is in {str(model.dtype).removeprefix('torch.')}; put it "
                "before quantize.bf16 or quantize.fp16."
            )
        if self.fresh:
            refuse_zeros(model, "distill:fresh=true")
        half, origin = bfloat16_is_fast(), resolve(self.model).sha if self.model else ""
        student = anew(model, context.seed) if self.fresh else copy.deepcopy(model)
        student.requires_grad_(True)
        parameters = list(student.parameters())
        masks = where_weights_may_move(student, parameters)
        loss: Loss = cross_entropy
        if self.loss != "ce":
            loss = self._lesson(student, teaching(self._teacher(student, context), context), context)
            if isinstance(loss, Matched):
                parameters += list(loss.maps.parameters())
        if self.written:
            loss = Written(loss, self.written)
        self.fit(student, loss, parameters, context, half, masks)
        if self.model and resolve(self.model).sha != origin:
            raise RecipeError(
                f"{self.model} changed while it taught, so that nobody can say who the teacher was; measure once more."
            )
        return student

    def _teacher(self, student: PreTrainedModel, context: Context) -> PreTrainedModel:
        if context.reference is None or (context.variant is None and self.model):
            raise RecipeError("distill needs the reference, from which its teacher is made.")
        if self.model:
            theirs = load_tokenizer(resolve(self.model))
            if context.tokenizer is None or theirs.get_vocab() != context.tokenizer.get_vocab():
                raise RecipeError(
                    f"{self.model} has another tokenizer than the student; a teacher speaks of the same tokens."
                )
        if context.variant is not None and (self.model or self.teacher.techniques):
            teacher = context.variant(self.teacher, self.model)
        else:
            teacher = self.teacher.apply(
                context.reference, Context(seed=context.seed, tokenizer=context.tokenizer)
            )
        if self.top_k >= predicted(teacher):
            raise RecipeError(
                f"distill:top_k={self.top_k} leaves no rest of {predicted(teacher)} tokens; 0 takes every token."
            )
        rows, wanted = predicted(student), predicted(teacher)
        if rows != wanted:
            raise RecipeError(
                f"The student predicts {rows} tokens and the teacher {wanted}; a teacher has the student's tokenizer."
            )
        return teacher

    def _lesson(self, student: PreTrainedModel, teacher: PreTrainedModel, context: Context) -> Loss:
        between = None if self.loss == "logits" else DIVERGENCES[self.loss](self.mix)
        answers: Teacher = live(teacher)
        if context.outputs and not (self.minutes or self.hidden or self.attention or self.written):
            windows, softened = self.windows(context), self.temperature if self.top_k else 1.0
            address = key("teacher", fingerprint(teacher), windows.tolist(), self.top_k, softened)
            answers = context.outputs(teacher, windows, address, self.top_k, softened)
            record = context.record
            record.teacher_s, record.teacher_mb = answers.seconds, answers.n_bytes / 1e6
            record.spared_s += answers.seconds if answers.known else 0.0
        said = Divergence(answers, between, self.temperature, self.top_k, self.hard)
        if not (self.hidden or self.attention):
            return said
        return Matched(said, student, teacher, self.hidden, self.attention, context.seed)


def anew(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """A copy with random weights, as its layout is initialized; shapes stay, uneven ones too."""
    model = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for module in model.modules():
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                tensor._is_hf_initialized = not isinstance(tensor, nn.Parameter)
            model._init_weights(module)
    model.tie_weights()
    return model


# States and attention


def opposite(blocks: int, of_teacher: int) -> list[int]:
    """The block of the teacher that each block of a student looks at; the last two meet."""
    return [round((place + 1) * of_teacher / blocks) - 1 for place in range(blocks)]


class Seen:
    """What blocks hand on, and how they attend, of the last batch that a model has read."""

    def __init__(self) -> None:
        self.states: dict[int, Tensor] = {}  # (batch, time, hidden)
        self.attention: dict[int, Tensor] = {}  # (batch, heads, time, time)


@contextmanager
def seeing(model: PreTrainedModel, attention: bool) -> Iterator[Seen]:
    """Note what the blocks of a model hand on while this lasts; with attention, computed in the open."""
    seen, (_, blocks) = Seen(), block_list(model)

    def states(place: int):
        def note(module: nn.Module, inputs: tuple, output: Tensor | tuple[Tensor, ...]) -> None:
            seen.states[place] = output[0] if isinstance(output, tuple) else output

        return note

    def weights(place: int):
        def note(module: nn.Module, inputs: tuple, output: tuple[Tensor, ...]) -> None:
            seen.attention[place] = output[1]

        return note

    with ExitStack() as stack:
        for place, block in enumerate(blocks):
            stack.callback(block.register_forward_hook(states(place)).remove)
            if attention:
                stack.callback(block.self_attn.register_forward_hook(weights(place)).remove)
        if attention:
            before = model.config._attn_implementation
            model.set_attn_implementation("eager")
            stack.callback(model.set_attn_implementation, before)
        yield seen


def states_apart(own: Tensor, teachers: Tensor) -> Tensor:
    """Squared difference of states (batch, time, hidden), relative to the teacher's, mean over tokens."""
    teachers = teachers.float()
    return ((own.float() - teachers).square().sum(-1) / teachers.square().sum(-1)).mean()


def attention_apart(own: Tensor, teachers: Tensor) -> Tensor:
    """KL divergence of attention (batch, heads, time, time), mean over tokens and heads.

    Where the numbers of heads differ, it is that of the mean of the heads.
    """
    if own.shape[1] != teachers.shape[1]:
        own, teachers = own.mean(1, keepdim=True), teachers.mean(1, keepdim=True)
    log_own = own.float().clamp_min(torch.finfo(torch.float32).tiny).log()  # 0 for tokens to come
    return (torch.special.xlogy(teachers, teachers).float() - teachers.float() * log_own).sum(-1).mean()


class Matched:
    """A loss, and how far states and attention of the student's blocks are from those of the teacher's.

    maps: from the width of the student to the teacher's where they differ, to be trained along.
    """

    def __init__(
        self,
        loss: Loss,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        hidden: float,
        attention: float,
        seed: int = 0,
    ) -> None:
        self.loss, self.teacher, self.hidden, self.attention = loss, teacher, hidden, attention
        self.pairs = opposite(len(block_list(student)[1]), len(block_list(teacher)[1]))
        own, wide = student.config.hidden_size, teacher.config.hidden_size
        self.maps = nn.ModuleList()
        if hidden and own != wide:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                self.maps.extend(nn.Linear(own, wide, bias=False) for _ in self.pairs)

    def __call__(self, model: PreTrainedModel, ids: Tensor) -> Tensor:
        with (
            seeing(model, self.attention > 0) as own,
            seeing(self.teacher, self.attention > 0) as theirs,
        ):
            loss = self.loss(model, ids)
        count = len(self.pairs)
        for place, other in enumerate(self.pairs):
            if self.hidden:
                states = self.maps[place](own.states[place]) if self.maps else own.states[place]
                loss = loss + self.hidden / count * states_apart(states, theirs.states[other])
            if self.attention:
                apart = attention_apart(own.attention[place], theirs.attention[other])
                loss = loss + self.attention / count * apart
        return loss


# What the student writes itself


@dataclass(frozen=True)
class Written:
    """A loss on windows of which the student has written a share itself, behind their first quarter.

    It learns about its own mistakes there, at the price of a pass for every token. Held-out text stays as it is.
    """

    loss: Loss
    share: float

    def __call__(self, model: PreTrainedModel, ids: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            rows = torch.rand(len(ids)) < self.share
            if rows.any():
                ids = ids.clone()
                ids[rows] = continued(model, ids[rows][:, : max(1, int(PROMPT * ids.shape[1]))], ids.shape[1])
        return self.loss(model, ids)


@torch.no_grad()
def continued(model: PreTrainedModel, ids: Tensor, length: int) -> Tensor:
    """Token ids (batch, time) drawn on from the model's own distribution to (batch, length)."""
    cache = DynamicCache(config=model.config)
    given = ids
    while ids.shape[1] < length:
        logits = head_logits(model, hidden_states(model, given, cache)[:, -1])
        given = torch.multinomial(logits.softmax(-1), 1)
        ids = torch.cat([ids, given], 1)
    return ids
