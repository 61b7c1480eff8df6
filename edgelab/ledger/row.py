"""The row: every field of a measurement, declared once, with its unit, its direction and what it means.

The ledger's columns, the table of the command line, plots, the report and the list of fields in docs/ read these
declarations. A measurement of a stranger brings declarations of its own, which are kept in one JSON column.
"""

from __future__ import annotations

import dataclasses
import json
import math
import typing
import uuid
from dataclasses import dataclass, field
from typing import Any, Literal

from edgelab import plugins
from edgelab.errors import EdgeLabError


class UndeclaredField(EdgeLabError):
    """A value under a name that no field declares; it would be lost."""


class ValueNotFinite(EdgeLabError):
    """A measured value that is NaN or infinite."""


@dataclass(frozen=True)
class Field:
    """What everybody has to know of a field.

    better: which way is better, None for what is no measure of anything. within: "protocol" for values that compare
    only where model, protocol, text and tokens agree, "text" for those that compare whatever the tokens, "machine" for
    those of one machine. heading: of its column in a
    terminal, empty for none. form: how the report writes a value, empty for no column. ends: the two fields that hold
    its interval. baseline: its value where nothing was changed.
    """

    label: str
    group: str = "own"
    unit: str = ""
    better: Literal["lower", "higher"] | None = None
    within: Literal["protocol", "text", "machine"] | None = None
    heading: str = ""
    form: str = ""
    ends: tuple[str, str] | None = None
    baseline: float | None = None
    meaning: str = ""

    @property
    def with_unit(self) -> str:
        """The label as an axis has it: "Weights (MB)"."""
        return f"{self.label} ({self.unit})" if self.unit else self.label

    @property
    def direction(self) -> str:
        return f"{self.better} is better" if self.better else ""


def declared(label: str, group: str, default: Any = None, **about: Any) -> Any:
    """A dataclass field with its declaration."""
    return field(default=default, metadata={"about": Field(label, group, **about)})


LOWER: dict[str, Any] = {"better": "lower"}
HIGHER: dict[str, Any] = {"better": "higher"}
MB: dict[str, Any] = {"unit": "MB", "better": "lower"}
RATE: dict[str, Any] = {"unit": "tokens/s", "better": "higher", "within": "machine"}


@dataclass
class Row:
    """One measurement: flat, units in the names, null where nothing was measured. MB is 10^6 bytes, NLL in nats."""

    recipe: str = field(
        metadata={
            "about": Field(
                "Recipe",
                "identity",
                heading="recipe",
                meaning="Techniques in order, and where the result runs.",
            )
        }
    )
    family: str = declared("Family", "identity", "baseline", meaning="Family of the last technique.")
    model: str = declared("Model", "identity", "")
    model_sha: str = declared(
        "Fingerprint of the model", "identity", "", meaning="Over configuration, tokenizer and weights."
    )
    variant: str | None = declared("Address of the variant", "identity")
    runtime: str = declared("Deployment", "identity", "torch", meaning="What the recipe names after the @.")
    kernel: str | None = declared("Kernel", "identity", meaning="What multiplies.")
    badge: str | None = declared(
        "Badge", "identity", heading="badge", meaning="packed, runtime, simulated or analytic."
    )
    seed: int = declared("Seed", "identity", 0)
    fast: bool = declared("Measured with EDGELAB_FAST", "identity", False)

    protocol: str | None = declared("Protocol of perplexity", "quality")
    corpus: str | None = declared("Text", "quality")
    windows: int | None = declared("Windows asked for", "quality")
    n_tokens: int | None = declared("Tokens scored", "quality")
    nll_sum: float | None = declared("Sum of NLL", "quality", unit="nats", within="protocol")
    ppl: float | None = declared(
        "Perplexity", "quality", **LOWER, within="protocol", heading="ppl", form=",.2f",
        meaning="How surprised the model is by the text, per token.",
    )  # fmt: skip
    bits_per_byte: float | None = declared(
        "Bits per byte of text",
        "quality",
        **LOWER,
        within="text",
        meaning="Comparable across tokenizers.",
    )
    delta_bits_per_byte: float | None = declared(
        "Bits per byte above the baseline", "quality", **LOWER, within="text", form="+.4f",
        ends=("delta_bits_per_byte_low", "delta_bits_per_byte_high"), baseline=0.0,
        meaning="Paired on the same characters, with a 95 % interval over windows: also where a variant has other "
        "tokens than the baseline, and so no ΔNLL.",
    )  # fmt: skip
    delta_bits_per_byte_low: float | None = declared("Lower end of the difference", "quality")
    delta_bits_per_byte_high: float | None = declared("Upper end of the difference", "quality")
    delta_nll: float | None = declared(
        "NLL above the baseline", "quality", unit="nats per token", **LOWER, within="protocol", heading="ΔNLL",
        form="+.4f", ends=("delta_nll_low", "delta_nll_high"), baseline=0.0,
        meaning="Negative log-likelihood minus the baseline's on the same windows, with a 95 % interval. Where the "
        "interval holds zero, this text does not tell the two apart.",
    )  # fmt: skip
    delta_nll_low: float | None = declared("Lower end of ΔNLL", "quality", unit="nats per token")
    delta_nll_high: float | None = declared("Upper end of ΔNLL", "quality", unit="nats per token")
    kld_mean: float | None = declared(
        "KL divergence from the reference", "quality", unit="nats per token", **LOWER, within="protocol",
        heading="KLD", form=".4f", baseline=0.0,
        meaning="How far the next-token probabilities moved from the reference's; 0 is identical.",
    )  # fmt: skip
    top1_agreement: float | None = declared(
        "Top-1 agreement with the reference", "quality", unit="share of tokens", **HIGHER, within="protocol",
        heading="top-1", form=".1%", baseline=1.0,
        meaning="Share of positions where the most likely token is the reference's.",
    )  # fmt: skip
    predicted_kld: float | None = declared(
        "Predicted KL divergence", "quality", unit="nats per token", **LOWER,
        meaning="What a technique that plans, such as quantize.mixed, expected before it was measured.",
    )  # fmt: skip
    window_nll: list[float] | None = declared(
        "Mean NLL of each window", "quality", unit="nats per token", meaning="For paired differences."
    )

    last_word: float | None = declared(
        "Last words predicted", "tasks", unit="share of sentences", **HIGHER, within="text", heading="last word",
        form=".1%", meaning="Share of sentences in the scored windows whose last word is the most likely one.",
    )  # fmt: skip
    last_word_items: int | None = declared("Sentences asked for their last word", "tasks")
    delta_last_word: float | None = declared(
        "Last words, difference to the baseline", "tasks", unit="share of sentences", **HIGHER, within="text",
        form="+.1%", ends=("delta_last_word_low", "delta_last_word_high"), baseline=0.0,
        meaning="Paired, sentence by sentence, with a 95 % interval over windows.",
    )  # fmt: skip
    delta_last_word_low: float | None = declared("Lower end of the difference", "tasks")
    delta_last_word_high: float | None = declared("Upper end of the difference", "tasks")
    last_word_lost: int | None = declared(
        "Last words that the baseline alone got", "tasks", meaning="With the next field, McNemar's counts."
    )
    last_word_won: int | None = declared("Last words that the baseline did not get", "tasks")
    last_word_right: str | None = declared(
        "Last words, item by item", "tasks", meaning="1 for right, 0 for wrong; a space between windows."
    )
    story_cloze: float | None = declared(
        "Story cloze", "tasks", unit="share of items", **HIGHER, within="text", form=".1%",
        meaning="Share of items where the true next sentence of a story beats three from other stories, by "
        "log-probability per byte; chance is a quarter.",
    )  # fmt: skip
    story_cloze_items: int | None = declared("Items of the story cloze", "tasks")
    delta_story_cloze: float | None = declared(
        "Story cloze, difference to the baseline", "tasks", unit="share of items", **HIGHER, within="text",
        ends=("delta_story_cloze_low", "delta_story_cloze_high"), baseline=0.0,
        meaning="Paired, item by item, with a 95 % interval over stories.",
    )  # fmt: skip
    delta_story_cloze_low: float | None = declared("Lower end of the difference", "tasks")
    delta_story_cloze_high: float | None = declared("Upper end of the difference", "tasks")
    story_cloze_lost: int | None = declared("Items that the baseline alone got", "tasks")
    story_cloze_won: int | None = declared("Items that the baseline did not get", "tasks")
    story_cloze_right: str | None = declared(
        "Story cloze, item by item", "tasks", meaning="1 for right, 0 for wrong; a space between stories."
    )
    extraction: float | None = declared(
        "Orders extracted", "tasks", unit="share of items", **HIGHER, within="text", form=".1%",
        meaning="Share of messages whose order is written as JSON without a wrong character.",
    )  # fmt: skip
    extraction_items: int | None = declared("Items of the extraction", "tasks")
    delta_extraction: float | None = declared(
        "Orders extracted, difference to the baseline", "tasks", unit="share of items", **HIGHER, within="text",
        ends=("delta_extraction_low", "delta_extraction_high"), baseline=0.0,
        meaning="Paired, item by item, with a 95 % interval over items.",
    )  # fmt: skip
    delta_extraction_low: float | None = declared("Lower end of the difference", "tasks")
    delta_extraction_high: float | None = declared("Upper end of the difference", "tasks")
    extraction_lost: int | None = declared("Orders that the baseline alone got", "tasks")
    extraction_won: int | None = declared("Orders that the baseline did not get", "tasks")
    extraction_right: str | None = declared(
        "Extraction, item by item", "tasks", meaning="1 for right, 0 for wrong."
    )
    extraction_answers: list[str] | None = declared("What was written as the order", "tasks")
    sample: list[str] | None = declared(
        "What the model writes", "tasks", meaning="Greedy continuations of three fixed prompts."
    )

    parameters: int | None = declared("Parameters", "size", **LOWER)
    weights_mb: float | None = declared(
        "Weights", "size", **MB, heading="MB", form=",.1f",
        meaning="Stored weights with scales and embedding; MB is 10⁶ bytes.",
    )  # fmt: skip
    linear_mb: float | None = declared("Linear layers", "size", **MB)
    embedding_mb: float | None = declared("Embedding", "size", **MB)
    scales_mb: float | None = declared("Scales and zero-points", "size", **MB)
    bits_per_weight: float | None = declared(
        "Effective bits per weight", "size", **LOWER, heading="bits/w", form=".2f",
        meaning="Stored bits of all weights over the number of weights.",
    )  # fmt: skip
    file_mb: float | None = declared("File", "size", **MB)
    adapter_mb: float | None = declared(
        "Adapter", "size", **MB, meaning="What stands beside the weights; part of what is stored."
    )
    kv_cache_mb_per_1k: float | None = declared(
        "KV cache", "size", unit="MB per 1,000 tokens", **LOWER, meaning="As the deployment keeps it."
    )
    peak_rss_mb: float | None = declared(
        "Peak memory of the process", "size", **MB, heading="RSS MB", form=",.0f",
        meaning="Peak of a fresh process that loads and generates, minus the peak of one that loads nothing.",
    )  # fmt: skip

    export_s: float | None = declared(
        "Writing the engine's file", "speed", unit="s", **LOWER, within="machine",
        meaning="Once for each variant.",
    )  # fmt: skip
    load_s: float | None = declared("Loading", "speed", unit="s", **LOWER, within="machine")
    compile_s: float | None = declared(
        "Compiling", "speed", unit="s", **LOWER, within="machine",
        meaning="Less where compiled code of an earlier run is on disk.",
    )  # fmt: skip
    prefill_tokens: int | None = declared("Tokens of the timed prompt", "speed")
    decode_tokens: int | None = declared("Tokens decoded for each timing", "speed")
    ttft_ms_p50: float | None = declared(
        "Time to first token", "speed", unit="ms", **LOWER, within="machine", heading="TTFT ms", form=",.1f",
        meaning="Median time from prompt to first token.",
    )  # fmt: skip
    prefill_tok_s: float | None = declared("Prefill", "speed", **RATE)
    tpot_ms_p50: float | None = declared(
        "Time per output token", "speed", unit="ms", **LOWER, within="machine", ends=("tpot_ms_p50", "tpot_ms_p95")
    )  # fmt: skip
    tpot_ms_p95: float | None = declared(
        "Time per output token, 95th percentile", "speed", unit="ms", **LOWER, within="machine"
    )
    decode_tok_s: float | None = declared(
        "Decoding", "speed", **RATE, heading="tok/s", form=",.1f",
        meaning="Tokens per second after the first, one sequence.",
    )  # fmt: skip
    iterations: int | None = declared("Timed turns", "speed")
    prefill_ratio: float | None = declared(
        "Prefill speed relative to the baseline", "speed", **HIGHER, within="machine", baseline=1.0
    )
    decode_ratio: float | None = declared(
        "Decoding speed relative to the baseline", "speed", **HIGHER, within="machine", heading="× none", form=".2f",
        ends=("decode_ratio_low", "decode_ratio_high"), baseline=1.0,
        meaning="Decoding rate over the baseline's in interleaved runs, with its spread: the number to compare "
        "speed by.",
    )  # fmt: skip
    decode_ratio_low: float | None = declared("Lower end of the ratio", "speed")
    decode_ratio_high: float | None = declared("Upper end of the ratio", "speed")

    devices: int | None = declared("Devices in use", "plan")
    predicted_ttft_ms: float | None = declared(
        "Time to first token, predicted", "plan", unit="ms", **LOWER, within="machine",
        meaning="From the times of the parts, measured alone, and the links.",
    )  # fmt: skip
    predicted_tpot_ms: float | None = declared(
        "Time per output token, predicted", "plan", unit="ms", **LOWER, within="machine"
    )
    predicted_tok_s: float | None = declared(
        "Tokens per second of all requests, predicted", "plan", **RATE,
        meaning="By the formula of a pipeline without bubbles.",
    )  # fmt: skip
    in_flight: int | None = declared("Requests in flight", "plan")
    in_flight_tok_s: float | None = declared("Tokens per second of all requests in flight", "plan", **RATE)
    plan: str | None = declared(
        "Plan",
        "plan",
        meaning="JSON: which layers run where, predicted and measured time of every stage, and why.",
    )
    sent_bytes_per_token: float | None = declared(
        "Sent over links for a token", "network", unit="bytes", **LOWER, meaning="Without framing."
    )
    predicted_bytes_per_token: float | None = declared(
        "Sent over links for a token, by formula", "network", unit="bytes", **LOWER
    )
    framing_bytes_per_token: float | None = declared(
        "Framing for a token",
        "network",
        unit="bytes",
        **LOWER,
        meaning="Headers of messages, on all links together.",
    )

    link: str | None = declared("Link to the cloud", "network")
    sent_bytes_per_request: float | None = declared(
        "Sent to the cloud for a request",
        "network",
        unit="bytes",
        **LOWER,
        meaning="With the headers of HTTP.",
    )
    received_bytes_per_request: float | None = declared(
        "Received from the cloud for a request", "network", unit="bytes", **LOWER
    )
    requests: float | None = declared(
        "Requests answered rightly", "requests", unit="share of items", **HIGHER, within="text", heading="requests",
        form=".1%", meaning="Share of sentences whose last word is what is written first.",
    )  # fmt: skip
    requests_items: int | None = declared("Requests", "requests")
    delta_requests: float | None = declared(
        "Requests answered rightly, difference to the baseline", "requests", unit="share of items", **HIGHER,
        within="text", ends=("delta_requests_low", "delta_requests_high"), baseline=0.0,
        meaning="Paired, item by item, with a 95 % interval.",
    )  # fmt: skip
    delta_requests_low: float | None = declared("Lower end of the difference", "requests")
    delta_requests_high: float | None = declared("Upper end of the difference", "requests")
    requests_lost: int | None = declared("Requests that the baseline alone got", "requests")
    requests_won: int | None = declared("Requests that the baseline did not get", "requests")
    requests_right: str | None = declared(
        "Requests, one by one", "requests", meaning="1 for right, 0 for wrong."
    )
    request_ms_p50: float | None = declared(
        "Time of a request, median", "requests", unit="ms", **LOWER, within="machine", heading="p50 ms", form=",.0f",
        meaning="From the question to the whole answer, the way over the link included, of the requests that were "
        "answered.",
    )  # fmt: skip
    request_ms_p95: float | None = declared(
        "Time of a request, 95 %",
        "requests",
        unit="ms",
        **LOWER,
        within="machine",
        heading="p95 ms",
        form=",.0f",
    )
    cloud_share: float | None = declared(
        "Answered by the cloud", "requests", unit="share of requests", heading="cloud", form=".0%"
    )
    alone_share: float | None = declared(
        "Answered by the edge for want of the cloud", "requests", unit="share of requests", **LOWER,
        meaning="The cloud was to be asked, and did not answer in time.",
    )  # fmt: skip
    unanswered_share: float | None = declared(
        "Answered by nobody", "requests", unit="share of requests", **LOWER,
        meaning="A split model answers nothing where its cloud does not answer in time.",
    )  # fmt: skip
    edge_j_per_request: float | None = declared(
        "Energy at the edge for a request", "requests", unit="J", **LOWER, within="machine",
        meaning="Seconds in which the edge computes, at the power that was named; the radio is not in it.",
    )  # fmt: skip
    usd_per_1k_requests: float | None = declared(
        "Price of a thousand requests", "requests", unit="USD", **LOWER, form=".4f",
        meaning="Tokens of the cloud, data of a metered link, and electricity of the edge where its energy is known, "
        "by data/prices.csv.",
    )  # fmt: skip
    writing_ms_per_token: float | None = declared(
        "Time per token of a longer answer", "requests", unit="ms", **LOWER, within="machine", heading="ms/token",
        form=",.0f", meaning="Median over 12 answers of 32 tokens, from the question to the end, the prompt included.",
    )  # fmt: skip
    acceptance: float | None = declared(
        "Drafted tokens accepted", "requests", unit="share of drafted tokens", **HIGHER, form=".0%"
    )
    tokens_per_round: float | None = declared(
        "Tokens written in a round",
        "requests",
        **HIGHER,
        meaning="Of speculative decoding: accepted ones and one more.",
    )
    writing_sample: list[str] | None = declared("Longer answers", "requests")
    leaked_share: float | None = declared(
        "Data with a form that leaves", "requests", unit="share of entities", **LOWER, heading="leaked", form=".0%",
        meaning="E-mail, telephone, card, IBAN and IP, in messages of our own: sent as they are ÷ present.",
    )  # fmt: skip
    private_right: float | None = declared(
        "Questions about such messages answered rightly",
        "requests",
        unit="share of items",
        **HIGHER,
        form=".1%",
    )
    private_ms_p50: float | None = declared(
        "Time of such a question, median", "requests", unit="ms", **LOWER, within="machine", form=",.0f"
    )
    private_ms_p95: float | None = declared(
        "Time of such a question, 95 %", "requests", unit="ms", **LOWER, within="machine", form=",.0f"
    )
    private_cloud_share: float | None = declared(
        "Such questions answered by the cloud", "requests", unit="share of requests", form=".0%"
    )
    private_sent_bytes: float | None = declared(
        "Sent to the cloud for such a question", "requests", unit="bytes", **LOWER,
        meaning="On average over all of them, with the headers of HTTP.",
    )  # fmt: skip
    private_received_bytes: float | None = declared(
        "Received from the cloud for such a question", "requests", unit="bytes", **LOWER
    )
    private_edge_j: float | None = declared(
        "Energy at the edge for such a question", "requests", unit="J", **LOWER, within="machine",
        meaning="Seconds in which the edge computes, looking for personal data included, at the power that was named.",
    )  # fmt: skip
    private_usd_per_1k: float | None = declared(
        "Price of a thousand such questions", "requests", unit="USD", **LOWER, form=".4f",
        meaning="Counted as the price of a thousand requests.",
    )  # fmt: skip
    private: str | None = declared(
        "How such questions were answered",
        "requests",
        meaning="JSON: right answers by what is asked for, samples, and times of every question.",
    )
    served: str | None = declared(
        "How requests were served", "requests",
        meaning="JSON: threshold, scores and times of every request, what went wrong on the way.",
    )  # fmt: skip

    apply_s: float | None = declared(
        "Making the variant", "cost", unit="s", **LOWER, within="machine", meaning="All its stages together."
    )
    train_tokens: int | None = declared("Training tokens", "cost", **LOWER)
    train_corpus: str | None = declared("Training text", "cost")
    teacher_s: float | None = declared(
        "Seconds of the teacher", "cost", unit="s", **LOWER,
        meaning="What a teacher took to read the training text, where its answers were kept.",
    )  # fmt: skip
    teacher_mb: float | None = declared(
        "Answers of the teacher on disk",
        "cost",
        unit="MB",
        **LOWER,
        meaning="Final hidden states, or the likeliest tokens where a recipe asks for top_k.",
    )
    calibration_tokens: int | None = declared("Calibration tokens", "cost", **LOWER)
    notes: str | None = declared(
        "Notes", "cost", meaning="What the checkpoint and the techniques have to say about this run."
    )

    energy_j_per_token: float | None = declared(
        "Energy", "energy", unit="J per token", **LOWER, within="machine"
    )
    energy_basis: str | None = declared(
        "Basis of the energy",
        "energy",
        meaning="RAPL's counters, or an estimate from a power that was given.",
    )

    parity: str | None = declared(
        "Parity gate", "parity", meaning="passed, failed, or own weights; of the variant and its export."
    )
    parity_detail: str | None = declared("Numbers behind the gate", "parity")

    host: str | None = declared("Machine", "provenance", meaning="A hash, so that rows can be shared.")
    cpu: str | None = declared("Processor", "provenance")
    cores: int | None = declared("Cores", "provenance")
    threads: int | None = declared("Threads", "provenance")
    ram_gb: float | None = declared("Memory of the machine", "provenance", unit="GB")
    os: str | None = declared("System", "provenance")
    python: str | None = declared("Python", "provenance")
    versions: str | None = declared("Versions of packages", "provenance", meaning="JSON.")
    made_by: str | None = declared(
        "Versions of techniques, export and measurements", "provenance", meaning="JSON; part of the question."
    )
    git_sha: str | None = declared("Commit of the project", "provenance")
    started_at: str | None = declared("Start", "provenance")
    duration_s: float | None = declared("Duration", "provenance", unit="s")
    row_id: str = field(
        default_factory=lambda: uuid.uuid4().hex,
        metadata={"about": Field("Identity of the row", "provenance")},
    )
    status: str = declared(
        "Status", "provenance", "ok", heading="status", meaning="ok, error, oom or timeout."
    )
    error: str | None = declared("Reason of a failure", "provenance")
    extra: dict[str, Any] = field(
        default_factory=dict, metadata={"about": Field("Fields of further measurements", "provenance")}
    )

    def __getitem__(self, name: str) -> Any:
        """The value of a field, also of one that a stranger's measurement declared."""
        return self.extra.get(name) if name not in FIELDS else getattr(self, name)

    def fill(self, values: dict[str, Any]) -> None:
        """Set fields, in place.

        Raises UndeclaredField for a name that nobody has declared, ValueNotFinite for NaN or infinity.
        """
        for name, value in values.items():
            if not _is_finite(value):
                shown = value if isinstance(value, float) else "not finite"
                raise ValueNotFinite(
                    f"{name} is {shown}: under this recipe the model is unusable; use more bits or a number format "
                    "that reaches further."
                )
            if name in FIELDS and name != "extra":
                setattr(self, name, value)
            elif name in OTHERS:
                self.extra[name] = value
            else:
                raise UndeclaredField(
                    f"No field is called '{name}'; declare it in ledger/row.py, or with the measurement that fills it."
                )

    def flat(self) -> dict[str, Any]:
        """One value for each field, those of strangers among them, without what is kept window by window."""
        kept = {name: value for name, value in vars(self).items() if name not in ("window_nll", "extra")}
        return kept | self.extra


def _is_finite(value: Any) -> bool:
    if isinstance(value, list | dict):
        return all(map(_is_finite, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, float) or math.isfinite(value)


def strict_json(value: Any) -> str:
    """JSON as its standard has it: null in place of NaN and infinity, which tables and older rows may hold."""
    return json.dumps(_without_holes(value), allow_nan=False)


def _without_holes(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_holes(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_without_holes(one) for one in value]
    return value if _is_finite(value) else None


FIELDS: dict[str, Field] = {one.name: one.metadata["about"] for one in dataclasses.fields(Row)}
OTHERS: dict[str, Field] = {}  # declared by measurements from elsewhere


def declare(fields: dict[str, Field]) -> None:
    """Enter fields of a measurement that is no part of edgelab. Raises UndeclaredField for a name that is taken."""
    for name, about in fields.items():
        if name in FIELDS:
            raise UndeclaredField(f"'{name}' is a field of every row already; give yours another name.")
        OTHERS[name] = about


def every_field() -> dict[str, Field]:
    """All declarations by name, those of plugins among them."""
    plugins.load()
    return FIELDS | OTHERS


def value_types() -> dict[str, type]:
    """The type of the values of each field of Row: str, int, float, bool, list or dict."""
    hints = typing.get_type_hints(Row)
    found = {}
    for name in FIELDS:
        kind = next((one for one in typing.get_args(hints[name]) if one is not type(None)), None)
        kind = hints[name] if kind is None or typing.get_origin(hints[name]) in (list, dict) else kind
        found[name] = typing.get_origin(kind) or kind
    return found
