"""What the unit tests share: tiny models of five layouts with a byte-level tokenizer, and a home of their own."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from edgelab import corpora, recipes, reference
from edgelab.deployments.partition.problem import Problem
from edgelab.deployments.partition.worker import Worker
from edgelab.storage import variants

settings.register_profile("edgelab", deadline=None)  # a busy machine is no failure
settings.load_profile("edgelab")

STORY = (
    "The lighthouse keeper counted ships. On Monday he saw three, on Tuesday none, and on Wednesday "
    "a whole fleet of twenty-one came past the rocks before breakfast.\n"
    "«Où vont-ils ?» he asked the gulls; the gulls, who knew, said nothing.\n\n"
    "Every evening he wrote the number into a book, and the book into a box, and the box under his bed. "
)
SHAPE = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
LAYOUTS = {
    "llama": {"tie_word_embeddings": True},
    "qwen3": {"tie_word_embeddings": True, "head_dim": 16},
    "gemma": {"head_dim": 16},
    "phi": {"tie_word_embeddings": False},
    "stablelm": {"tie_word_embeddings": False, "use_qkv_bias": True},
}


@pytest.fixture(autouse=True)
def home(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty EDGELAB_HOME for every test but those of the embedded model, which read the real one."""
    from edgelab import assets

    if not request.node.get_closest_marker("embedded"):
        monkeypatch.setenv("EDGELAB_HOME", str(tmp_path / "home"))
    for name in ("EDGELAB_FAST", "EDGELAB_CACHE_GB"):
        monkeypatch.delenv(name, raising=False)
    return assets.home()


@pytest.fixture(scope="session")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """256 bytes, two special tokens and 42 merges learned from STORY: any text, 300 tokens, none unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SHAPE["vocab_size"],
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([STORY], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def make_model(layout: str, **changes: object) -> PreTrainedModel:
    """A seeded random model of SHAPE. Weights are ten times the usual size, so that logits are far from uniform."""
    config = AutoConfig.for_model(layout, **{**SHAPE, **LAYOUTS.get(layout, {}), **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.2)
            else:
                parameter.add_(
                    torch.randn_like(parameter) * 0.1
                )  # norms and biases that a test would miss at 1 and 0
    return model.eval()


@pytest.fixture(scope="session")
def new_model() -> Callable[..., PreTrainedModel]:
    """`new_model(layout, **config)`: a fresh tiny model of a layout of transformers."""
    return make_model


@pytest.fixture(scope="session")
def folder_of(
    tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: PreTrainedTokenizerFast
) -> Callable[[str], Path]:
    """`folder_of(layout)`: the folder of the tiny model of that layout, with its tokenizer."""
    made: dict[str, Path] = {}

    def folder(layout: str) -> Path:
        if layout not in made:
            made[layout] = tmp_path_factory.mktemp("models") / f"tiny-{layout}"
            make_model(layout).save_pretrained(made[layout])
            byte_tokenizer.save_pretrained(made[layout])
        return made[layout]

    return folder


@pytest.fixture(scope="session")
def tiny(folder_of: Callable[[str], Path]) -> Path:
    """The folder of a two-layer Llama with tied embeddings; `edgelab.reference.load(str(tiny))` reads it."""
    return folder_of("llama")


@pytest.fixture(scope="session")
def tiny_reference(tiny: Path) -> reference.Reference:
    """The model and tokenizer of `tiny`. Shared by all tests: nothing may change it."""
    return reference.load(str(tiny))


@pytest.fixture(scope="session", params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> str:
    """Each of the five layouts in turn: Llama, Qwen3, Gemma (tied), Phi, StableLM (untied)."""
    return request.param


@pytest.fixture(scope="session")
def story(tiny_reference: reference.Reference) -> corpora.TokenizedText:
    """About 5,000 tokens of text, characters of two and three bytes among them."""
    text = "".join(f"{STORY}Page {page}, {page * 7919 % 1000} €.\n" for page in range(28))
    return corpora.tokenize_text(text, tiny_reference.tokenizer, "story")


class InThisProcess:
    """A worker in threads of the test. Killed, it closes all connections, as the end of a process would."""

    fails = ()  # methods

    def __init__(self) -> None:
        self.worker = Worker(torch.get_num_threads())

    def begin(self, method: str, *arguments: object) -> Callable[[], object]:
        if method in self.fails:
            raise RuntimeError("The actor died.")
        found = getattr(self.worker, method)(*arguments)
        return lambda: found

    def kill(self) -> None:
        self.worker.close()


@pytest.fixture
def start() -> Iterator[Callable[[str, int], InThisProcess]]:
    """What starts the workers of a partition, in this process; `start.workers` holds them by device."""
    found: dict[str, InThisProcess] = {}

    def start(name: str, place: int) -> InThisProcess:
        found[name] = InThisProcess()
        return found[name]

    start.workers = found
    yield start
    for one in found.values():
        one.kill()


@pytest.fixture
def relay() -> Problem:
    """Six equal layers, three devices; the way from 0 to 2 is slow, and that over 1 is not. Seconds and bytes."""
    return Problem(
        seconds=np.tile([10.0, 10.0, 1.0], (6, 1)),
        handed=np.array([16.0] * 5 + [0.0]),
        memory=np.ones(6),
        room=np.array([6.0, 6.0, 5.0]),
        bandwidth=np.array([[np.inf, 6.4, 0.125], [6.4, np.inf, 6.4], [0.125, 6.4, np.inf]]),
    )


@pytest.fixture
def variant(
    tmp_path: Path, new_model: Callable[..., PreTrainedModel], byte_tokenizer: PreTrainedTokenizerFast
) -> Callable[..., Path]:
    """`variant(recipe, layout, **config)`: the folder of a variant of a tiny model, with its tokenizer."""

    def make(text: str, layout: str = "llama", **changes: object) -> Path:
        model = new_model(layout, **changes)
        for technique in recipes.parse(text).techniques:
            model = technique.apply(model, recipes.Context(reference=model))
        folder = tmp_path / "variants" / text.replace("/", "")
        variants.save(model, folder, {"recipe": text}, byte_tokenizer)
        return folder

    return make


@pytest.fixture(
    params=[
        {"num_hidden_layers": 1},
        {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16},
        {"intermediate_size": 96},
        {"hidden_size": 32, "head_dim": 16},
    ],
    ids=["layers", "heads", "channels", "hidden"],
)
def smaller(request: pytest.FixtureRequest) -> dict[str, int]:
    """What pruning leaves of a tiny model: fewer layers, heads, MLP channels or hidden sizes."""
    return request.param


@pytest.fixture
def cloud_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clouds of deployments answer in threads of this process, for tests that neither end nor count processes."""
    from edgelab.deployments.hybrid import remote
    from edgelab.deployments.hybrid.server import serving

    @contextmanager
    def started(settings: serving.Settings) -> Iterator[SimpleNamespace]:
        told, over = queue.Queue(), threading.Event()
        thread = threading.Thread(
            target=serving.serve, args=(settings, lambda *said: told.put(said), over.wait)
        )
        thread.start()
        try:
            url, token = told.get(timeout=60)
            yield SimpleNamespace(url=url, token=token)
        finally:
            over.set()
            thread.join()

    monkeypatch.setattr(remote, "started", started)
