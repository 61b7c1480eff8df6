"""What runs in a process of its own: one variant, made, looked at, scored and run. `road` asks, and writes the row.

Arguments and results are JSON. What measurements return by name are fields of the row.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import os
import time
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgelab import corpora, recipes, reference, runtimes
from edgelab.corpora import TokenizedText
from edgelab.measure import (
    Asked,
    energy,
    isolation,
    latency,
    measurements,
    memory,
    parity,
    perplexity,
    protocols,
    sample,
)
from edgelab.model.finite import NotFiniteError
from edgelab.model.shapes import skeleton
from edgelab.runtimes.session import Session
from edgelab.storage import variants
from edgelab.storage.description import Description

if TYPE_CHECKING:
    from edgelab.deployments.hybrid.answering import Answering


class Bench:
    """One variant of a model. `asked` is what measurements have to know."""

    def __init__(self, recipe: str, model: str, seed: int, asked: dict[str, Any] | None = None) -> None:
        self.recipe = recipes.parse(recipe)
        self.model, self.seed = model, seed
        self.asked = Asked(**asked or {})
        self.report = isolation.report

    # What measurements look at

    @cached_property
    def source(self) -> reference.Source:
        return reference.resolve(self.model)

    @cached_property
    def reference_tokenizer(self) -> Any:
        return reference.load_tokenizer(self.source)

    @cached_property
    def tokenizer(self) -> Any:
        return variants.load_own_tokenizer(self.folder) or self.reference_tokenizer

    @cached_property
    def folder(self) -> Path:
        return variants.build(self.recipe, self.source, self.seed, self.report)

    @cached_property
    def about(self) -> dict[str, Any]:
        return variants.read_about(self.folder)

    @cached_property
    def description(self) -> Description:
        return variants.read_description(self.folder)

    @cached_property
    def export(self) -> runtimes.Export | None:
        deployment = self.recipe.deployment
        engine = getattr(deployment, "edge", None) if deployment.parts else deployment
        return None if engine is None else runtimes.exported(engine, self.folder)

    @property
    def cache_bytes(self) -> float:
        """Bytes of one key or value as the deployment keeps it."""
        if self.recipe.deployment.in_torch:
            return 4 if self.description.dtype == "float32" else 2
        return runtimes.find(self.recipe.runtime).cache_bits / 8

    @cached_property
    def session(self) -> Session:
        return runtimes.load(self.recipe.deployment, self.folder)

    @cached_property
    def service(self) -> Answering:
        from edgelab.deployments.hybrid import answering  # with statistics, which no other row needs

        return answering.start(self.recipe.deployment, self.folder, self.tokenizer, self.model, self.seed)

    @cached_property
    def rules(self) -> protocols.Protocol:
        return protocols.protocol(self.asked.protocol)

    @cached_property
    def reference_text(self) -> TokenizedText:
        needed = max(self.asked.windows * self.rules.window, self.asked.prompt_tokens)
        text = corpora.tokenize(self.asked.corpus, self.reference_tokenizer, tokens=needed)
        rows = reference.embedding_rows(reference.load_config(self.source))
        corpora.check_tokens(text.ids[:needed].tolist(), rows, self.reference_tokenizer)
        return text

    @cached_property
    def reference_cut(self) -> list[perplexity.Window]:
        return perplexity.windows(
            self.reference_text, self.rules, self.reference_tokenizer, self.asked.windows
        )

    @property
    def text(self) -> TokenizedText:
        return self.reference_text if self._as_reference else self._retokenized[0]

    @property
    def cut(self) -> list[perplexity.Window]:
        return self.reference_cut if self._as_reference else self._retokenized[1]

    @property
    def _as_reference(self) -> bool:
        return self.tokenizer is self.reference_tokenizer

    @cached_property
    def _retokenized(self) -> tuple[TokenizedText, list[perplexity.Window]]:
        return perplexity.retokenized(self.reference_text, self.reference_cut, self.tokenizer)

    # What the road asks

    def pid(self) -> int:
        return os.getpid()

    def check_text(self) -> int:
        """The number of windows that can be scored. Raises an EdgeLabError for a text or protocol that does not fit."""
        return len(self.reference_cut)

    def build(self) -> None:
        """Make the variant, unless it is in the cache."""
        assert self.folder
        self.report(1, 1)

    def measure(self, names: list[str]) -> dict[str, Any]:
        """Values of measurements of one need, by name: those of the variant, of its logits, or of its session."""
        chosen = [measurements()[name] for name in names]
        if chosen and chosen[0].needs == "logits":
            if not self.session.gives_logits:
                return {}
            return perplexity.score(self, chosen)
        found: dict[str, Any] = {}
        for one in chosen:
            found |= one.run(self)
        return found

    def engine(self) -> dict[str, Any]:
        """What runs: fields that a loaded session knows."""
        return {"kernel": self.session.kernel, "badge": self.session.badge}

    def serving(self) -> dict[str, Any]:
        """What has answered, which ends with this: fields that a deployment knows."""
        known = {"kernel": self.service.kernel, "badge": self.service.badge}
        self.service.close()
        return known

    def gate(self) -> dict[str, str]:
        """The verdict of the parity gate: the deployment against PyTorch in dense floats, over the same variant."""
        twin = runtimes.load("simulated", self.folder)  # kernels of `torch` round as much as an engine does
        if self.session.gives_logits:
            cut = self.cut[: parity.WINDOWS]
            verdict = parity.by_logits(
                perplexity.logit_slices(self.session.logits, cut), perplexity.slices(twin.model, cut)
            )
        else:
            asked = parity.prompts(corpora.tokenize(self.asked.corpus, self.tokenizer).ids)
            verdict = parity.by_answers(self._answers(self.session, asked), self._answers(twin, asked))
        return {"parity": "passed" if verdict.passed else "failed", "parity_detail": verdict.detail}

    def _answers(self, speaker: Session, asked: list[list[int]]) -> list[parity.Answer]:
        found = []
        for answer in parity.answers(speaker, asked):
            found.append(answer)
            self.report(len(found), len(asked))
        return found

    def write(self, prompt: str, tokens: int) -> str:
        """The greedy continuation of a prompt."""
        return sample.write(self.session, self.tokenizer, prompt, tokens)

    def profile(self) -> dict[str, Any]:
        """What every part of the variant takes here, on one thread."""
        from edgelab.deployments.partition.profiling import measured

        found = measured(self.folder, self.source.name, self.recipe.weights, progress=self.report)
        return dataclasses.asdict(found)

    def open(self) -> dict[str, Any]:
        """Load the variant. What the process needs without it is left out of its memory."""
        skeleton(variants.load_config(self.folder))
        if variants.read_description(self.folder).adapter:
            importlib.import_module("peft")  # a library is no weight of the adapter
        self.nothing_mb = memory.peak_rss_mb()
        started = time.perf_counter()
        session = self.session
        load_s = time.perf_counter() - started
        compile_s = session.compile() if hasattr(session, "compile") else None
        return self.engine() | {"load_s": load_s, "compile_s": compile_s}

    def warm_up(self) -> int:
        """Warm up with the first tokens of the text as prompt, repeated where they are too few."""
        wanted = self.asked.prompt_tokens
        ids = self.text.ids[:wanted].tolist()
        prompt = (ids * math.ceil(wanted / len(ids)))[:wanted]
        if not math.isfinite(self.session.top(prompt, 1)[0][1]):
            raise NotFiniteError(
                "The model answers the prompt with NaN or infinity; measure its quality, which names the layer."
            )
        self.timed = latency.Timed(self.session, prompt)
        self.meter, self.tokens = None, 0
        return self.timed.warm_up()

    def prefill(self) -> float:
        return self.timed.prefill()

    def decode(self, tokens: int) -> list[float]:
        with energy.metered() as meter:
            times = self.timed.decode(tokens)
        self.meter = meter if self.meter is None else self.meter + meter
        self.tokens += tokens
        return times
