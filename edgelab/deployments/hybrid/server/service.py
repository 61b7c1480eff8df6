"""What the cloud runs: a variant as a session, its tokenizer, and for split inference the second part of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgelab import recipes, runtimes
from edgelab.deployments.hybrid.server.limits import Limits
from edgelab.deployments.hybrid.server.messages import Refusal
from edgelab.deployments.partition.stage import Stage
from edgelab.errors import EdgeLabError
from edgelab.reference import EMBEDDED, load_tokenizer, resolve
from edgelab.runtimes.session import Session
from edgelab.storage import variants

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class CutError(EdgeLabError):
    """A cut that a model has not."""


@dataclass
class Service:
    """A session that is served. name: what clients call the model. context: tokens that fit, None where nobody says.

    second: the stage behind the cut, for split inference; cut: layers before it, which the edge runs.
    """

    session: Session
    tokenizer: PreTrainedTokenizerBase
    name: str
    context: int | None = None
    second: Stage | None = None
    cut: int | None = None

    @classmethod
    def load(
        cls, recipe: str, model: str = EMBEDDED, *, seed: int = 0, cut: int | None = None, name: str = ""
    ) -> Service:
        """Make a recipe's variant where it is not there yet, and load it as its deployment says.

        Raises an EdgeLabError where that cannot be, CutError for a cut that leaves no layer or is beyond the last.
        """
        parsed, source = recipes.parse(recipe), resolve(model)
        folder = variants.build(parsed, source, seed, lambda done, of: None)
        config = variants.load_config(folder).get_text_config()
        second = None
        if cut is not None:
            if not 0 <= cut <= config.num_hidden_layers:
                raise CutError(
                    f"cut={cut} is none of a model of {config.num_hidden_layers} layers; give the number of layers "
                    "that the edge runs."
                )
            second = Stage.load(folder, cut + 1, config.num_hidden_layers + 2)
        return cls(
            runtimes.load(parsed.deployment, folder),
            variants.load_own_tokenizer(folder) or load_tokenizer(source),
            name or f"{source.name}: {parsed}",
            getattr(config, "max_position_embeddings", None),
            second,
            cut,
        )

    def close(self) -> None:
        """Give back what it holds."""
        self.session.close()
        self.second = None

    def check_ids(self, ids: list[int]) -> None:
        """Raises Refusal for a token that the model has not."""
        if (largest := max(ids, default=0)) >= self.session.vocabulary:
            shown = largest if largest < 10**9 else "a far larger number"
            raise Refusal(
                400,
                "unknown_token",
                f"Tokens have to be below {self.session.vocabulary}, and one is {shown}.",
            )

    def check_room(self, tokens: int, limits: Limits, more: int = 0) -> None:
        """Raises Refusal for a prompt that is too long, by itself or with `more` tokens behind it."""
        if tokens > limits.prompt_tokens:
            raise Refusal(
                400,
                "prompt_too_long",
                f"The prompt has {tokens} tokens, and at most {limits.prompt_tokens} are read.",
            )
        self.check_context(tokens + more)

    def check_context(self, tokens: int) -> None:
        """Raises Refusal where so many tokens are more than the model was made for."""
        if self.context is not None and tokens > self.context:
            raise Refusal(
                400,
                "context_length_exceeded",
                f"Prompt and answer would be {tokens} tokens, and the model has room for {self.context}.",
            )
