"""What the cloud runs: a variant as a session, its tokenizer, and for split inference the second part of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil

from edgelab import recipes, runtimes
from edgelab.deployments.hybrid import check_cut
from edgelab.deployments.hybrid.server.limits import Limits
from edgelab.deployments.hybrid.server.messages import Refusal
from edgelab.deployments.partition.stage import Stage
from edgelab.reference import EMBEDDED, load_tokenizer, resolve
from edgelab.runtimes.session import Session
from edgelab.storage import variants
from edgelab.storage.kv_cache import head_shape

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

# Of the memory that is free, for keys and values of a prompt; reading it takes about as much again.
MEMORY_SHARE = 0.25


@dataclass
class Service:
    """A session that is served. name: what clients call the model. context: tokens that fit, None where nobody says.

    token_bytes: of the keys and values of a token in float32, 0 where they are not known.
    second: the stage behind the cut, for split inference; cut: layers before it, which the edge runs.
    """

    session: Session
    tokenizer: PreTrainedTokenizerBase
    name: str
    context: int | None = None
    second: Stage | None = None
    cut: int | None = None
    token_bytes: int = 0

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
            check_cut(cut, config.num_hidden_layers)
            second = Stage.load(folder, cut + 1, config.num_hidden_layers + 2)
        session = runtimes.load(parsed.deployment, folder)
        context = getattr(config, "max_position_embeddings", None)
        return cls(
            session,
            variants.load_own_tokenizer(folder) or load_tokenizer(source),
            name or str(parsed),
            getattr(session, "room", context),  # of an engine whose cache has a length of its own
            second,
            cut,
            token_bytes(config, config.num_hidden_layers),
        )

    def longest_prompt(self) -> int | None:
        """Tokens that fit the context and a share of the memory that is free; None where no context is known."""
        if self.context is None or not self.token_bytes:
            return self.context
        free = psutil.virtual_memory().available * MEMORY_SHARE
        return max(1, min(self.context, int(free / self.token_bytes)))

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


def token_bytes(config: PretrainedConfig, layers: int, itemsize: int = 4) -> int:
    """Of the keys and values of one token in so many layers."""
    heads, channels = head_shape(config)
    return 2 * layers * heads * channels * itemsize
