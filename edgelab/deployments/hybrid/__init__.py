"""Work shared between edge and cloud: asking the cloud when in doubt, drafting for it, splitting a model, redacting."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from edgelab.assets import data_dir, fingerprint
from edgelab.devices.prices import prices
from edgelab.errors import EdgeLabError
from edgelab.keys import key
from edgelab.network import find
from edgelab.recipes import Recipe, RecipeError, deployment, parse

if TYPE_CHECKING:
    from transformers import PretrainedConfig

LEAST_TEMPERATURE, MOST_TEMPERATURE = 1e-3, 2.0  # of what is sampled; the server takes no other but 0
MOST_DEADLINE_S = 86_400.0  # of a request; clocks of the operating system do not count to any number


class CutError(EdgeLabError):
    """A cut that a model has not."""


def check_cut(cut: int, layers: int) -> None:
    """Raises CutError where a model of so many layers cannot be cut behind `cut` of them."""
    if not 0 <= cut <= layers:
        raise CutError(
            f"cut={cut} is none of a model of {layers} layers; give the number of layers that the edge runs."
        )


def is_temperature(value: float) -> bool:
    """Whether drafts can be made and verified at a temperature: 0 is greedy, all others have to be sampled."""
    return value == 0 or LEAST_TEMPERATURE <= value <= MOST_TEMPERATURE


def is_deadline(seconds: float) -> bool:
    """Whether so many seconds are a deadline that can be waited for."""
    return 0 < seconds <= MOST_DEADLINE_S


def _check_deadline(seconds: float) -> None:
    if not is_deadline(seconds):
        raise RecipeError(f"deadline_s={seconds} should be above 0 and at most {MOST_DEADLINE_S:g}, a day.")


def _check_edge(edge: str) -> None:
    kind = type(parse(f"none @ {edge}").deployment)  # raises for a name that is none
    if not hasattr(kind, "engine"):
        raise RecipeError(f"edge={edge} shares requests and is no engine; give one, such as edge=torch.")


def priced() -> str:
    """The prices that requests are counted with, as data/prices.csv says now; where they are from does not count."""
    return f"prices {key('prices', asdict(prices()))[:8]}"


def linked(link: str) -> str:
    """What a link of data/links.csv is now; where its figures are from does not count."""
    return repr(replace(find(link), source=""))


@dataclass(frozen=True, kw_only=True)
class Shared:
    """What every way of sharing work with a cloud has in common.

    service: "module:Class" in this folder that answers requests.
    """

    cloud: Recipe = field(default_factory=Recipe)
    link: str = "lte"
    edge: str = "torch"
    deadline_s: float = 10.0

    service: ClassVar[str]
    packages: ClassVar[tuple[str, ...]] = ("fastapi", "uvicorn", "httpx")
    extra: ClassVar[str] = "hybrid"
    in_torch: ClassVar[bool] = True
    timed: ClassVar[bool] = True
    parts: ClassVar[tuple[str, ...]] = ("requests",)

    def __post_init__(self) -> None:
        _check_deadline(self.deadline_s)
        _check_edge(self.edge)
        if self.cloud.deployment.parts or self.cloud.runtime == "partition":
            raise RecipeError(f"cloud=({self.cloud}) runs on one device; leave out what follows its @.")

    def reads(self) -> list[str]:
        """What the link is, the techniques of the cloud, and the prices."""
        techniques = (f"{one.method}, version {one.version}" for one in self.cloud.techniques)
        return [linked(self.link), *techniques, priced()]


@deployment("cloud", shown=("cloud", "link"))
@dataclass(frozen=True, kw_only=True)
class CloudAlone(Shared):
    """The cloud answers every request; what the recipe describes answers where the cloud does not.

    cloud: recipe in parentheses that the cloud runs. link: between them, of data/links.csv. edge: engine of the part
    that the recipe describes. deadline_s: for a request, of which the edge keeps the time that it needs to answer
    alone.
    """

    service: ClassVar[str] = "edgelab.deployments.hybrid.cascading:AllInCloud"


@deployment("cascade", shown=("cloud", "link"))
@dataclass(frozen=True, kw_only=True)
class Cascade(Shared):
    """The edge answers each request, and the cloud answers again where the edge is in doubt.

    cloud: recipe in parentheses that the cloud runs. link: between them, of data/links.csv. edge: engine of the part
    that the recipe describes. deadline_s: for a request, behind which the edge's own answer counts. score: what doubt
    is read from: mean, minimum or 10 % point of the log-probabilities of the answer's tokens, minus the mean entropy,
    the mean margin between the two likeliest tokens, or router, learned from all of them. share: of requests that go
    to the cloud; the threshold is chosen for it on other requests. accuracy: to be reached there with the smallest
    share, 0 for none. threshold: of the score, in place of a choice.
    """

    score: Literal["mean", "minimum", "quantile", "entropy", "margin", "router"] = "margin"
    share: float = 0.3
    accuracy: float = 0.0
    threshold: float | None = None

    service: ClassVar[str] = "edgelab.deployments.hybrid.cascading:Cascaded"
    packages: ClassVar[tuple[str, ...]] = (*Shared.packages, "scikit-learn")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("share", "accuracy"):
            if not 0 <= getattr(self, name) <= 1:
                raise RecipeError(f"cascade:{name}={getattr(self, name)} is outside 0 to 1.")
        if self.threshold is not None and self.accuracy:
            raise RecipeError(
                f"threshold={self.threshold} and accuracy={self.accuracy} both say when the cloud is asked; give one."
            )


@deployment("speculative", shown=("cloud", "link", "draft"))
@dataclass(frozen=True, kw_only=True)
class Speculative(Shared):
    """The edge drafts some tokens, the cloud says which of them it would have written, and adds one.

    cloud: recipe in parentheses that the cloud runs. link: between them, of data/links.csv. edge: engine of the part
    that the recipe describes. deadline_s: for a request, of which the edge keeps the time that it needs to write alone.
    draft: tokens of a draft. adaptive: choose its length from the acceptance and the times so far, beginning with
    `draft`. pipelined: go on drafting while an answer is away. temperature: of what is sampled, 0.001 to 2, or 0 for
    the likeliest token.
    """

    draft: int = 4
    adaptive: bool = False
    pipelined: bool = False
    temperature: float = 0.0

    service: ClassVar[str] = "edgelab.deployments.hybrid.sharing:Drafted"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.draft <= 16:
            raise RecipeError(f"speculative:draft={self.draft} should be 1 to 16 tokens.")
        if not is_temperature(self.temperature):
            raise RecipeError(
                f"speculative:temperature={self.temperature} should be {LEAST_TEMPERATURE:g} to {MOST_TEMPERATURE:g}, "
                "or 0 for the likeliest token."
            )


@deployment("redact", shown=("cloud", "link", "policy"))
@dataclass(frozen=True, kw_only=True)
class Redact(Shared):
    """The cloud answers what a policy lets out; personal data is found by its form, and put back into the answer.

    cloud: recipe in parentheses that the cloud runs. link: between them, of data/links.csv. edge: engine of the part
    that the recipe describes. deadline_s: for a request, of which the edge keeps the time that it needs to answer
    alone. policy: edge, nothing leaves; local, what holds personal data stays; redact, it leaves with placeholders in
    the place of personal data; cloud, all leaves as it is.
    """

    policy: Literal["edge", "local", "redact", "cloud"] = "redact"

    service: ClassVar[str] = "edgelab.deployments.hybrid.redacting:Redacting"
    packages: ClassVar[tuple[str, ...]] = (*Shared.packages, "presidio-analyzer")
    parts: ClassVar[tuple[str, ...]] = ("privacy",)

    def reads(self) -> list[str]:
        """What the link is, the techniques of the cloud, the prices, and the messages."""
        messages = fingerprint(data_dir() / "privacy" / "prompts.jsonl")
        return [*super().reads(), f"privacy {messages[:8]}"]


@deployment("split", shown=("link", "cut"))
@dataclass(frozen=True, kw_only=True)
class Split:
    """The first layers run at the edge, the rest in the cloud, and hidden states travel, which keep nothing secret.

    link: between them, of data/links.csv. cut: layers at the edge, beside the embedding. wire: format of the states.
    deadline_s: for a request, behind which nobody answers.
    """

    link: str = "lte"
    cut: int = 5
    wire: Literal["float32", "float16", "int8", "int4"] = "float16"
    deadline_s: float = 10.0

    service: ClassVar[str] = "edgelab.deployments.hybrid.sharing:Halved"
    packages: ClassVar[tuple[str, ...]] = Shared.packages
    extra: ClassVar[str] = "hybrid"
    in_torch: ClassVar[bool] = True
    timed: ClassVar[bool] = True
    parts: ClassVar[tuple[str, ...]] = ("requests",)

    def __post_init__(self) -> None:
        _check_deadline(self.deadline_s)
        if self.cut < 0:
            raise RecipeError(f"split:cut={self.cut} should be at least 0.")

    def check_model(self, config: PretrainedConfig) -> None:
        """Raises CutError where a model of this configuration cannot be cut there."""
        check_cut(self.cut, config.num_hidden_layers)

    def reads(self) -> list[str]:
        """What the link is, and the prices."""
        return [linked(self.link), priced()]
