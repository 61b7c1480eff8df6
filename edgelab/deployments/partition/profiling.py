"""Timing the parts of a model on this machine: each part by itself while the whole runs.

What is left between the parts (masks, rotary angles, the walk through the model) is paid once by every stage, and so is
the sending of a hidden state: together they are the cost of a hand-over.
"""

from __future__ import annotations

import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import nn

from edgelab import assets
from edgelab.deployments.partition import wire
from edgelab.deployments.partition.profile import Timings
from edgelab.deployments.partition.stage import Stage
from edgelab.deployments.partition.wire import Kind, Message
from edgelab.devices.catalogue import HERE
from edgelab.devices.memory import kv_cache_bytes
from edgelab.devices.shapes import ModelShape
from edgelab.measure.bandwidth import read_gb_s
from edgelab.model.blocks import block_list
from edgelab.model.marks import marks_of
from edgelab.model.shapes import skeleton
from edgelab.network import LOCAL, Link, Proxies
from edgelab.storage.variants import load_config

CONTEXTS = (32, 128, 512)
PROMPTS = (32, 128, 512)
TOKENS = 16  # decoded behind each context; their median counts
PAUSE_S = (
    0.02  # before each of them, as a stage waits for the others: after a pause a step takes some 5 % longer
)
READS = 3  # of each prompt; their median counts
SENDS = 50  # of a hidden state, to and fro
COLD = 20_000_000  # numbers that are read before each: a stage leaves nothing in the caches but weights
FAST = Link("as fast as it goes", 1e5, 1e5)


def measured(
    folder: Path,
    model: str,
    recipe: str,
    *,
    threads: int = 1,
    contexts: tuple[int, ...] = CONTEXTS,
    prompts: tuple[int, ...] = PROMPTS,
    shaped: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Timings:
    """Time every part of a variant here, on so many threads. FAST times the shortest prompt and context alone.

    shaped: whether states will go through proxies, as where this machine plays all devices.
    """
    if assets.fast():
        contexts, prompts = contexts[:1], prompts[:1]
    with _on(threads):
        stage = Stage.load(folder, 0, count_of(folder))
        config = stage.model.config.get_text_config()
        watch = _Watch(stage)
        prefill, decode = [], []
        watch.read(1, 0)  # to warm up
        for prompt in prompts:
            prefill.append(_medians([watch.read(prompt, 0) for _ in range(READS)]))
            progress(len(prefill), len(prompts) + len(contexts))
        for context in contexts:
            watch.read(context, 0)
            decode.append(_medians([watch.read(1, context + step) for step in range(TOKENS)]))
            progress(len(prefill) + len(decode), len(prompts) + len(contexts))
        sending_ms, rate = sending(config.hidden_size, shaped=shaped), read_gb_s()
    between_ms = min(line[-1] for line in decode)
    for line in (*prefill, *decode):
        line[0] += line.pop()  # the first stage pays it in any plan
    shape = ModelShape.from_config(config)
    bits = stage.dtype.itemsize * 8 if (grid := marks_of(stage.model).cache) is None else grid.bits
    cache = kv_cache_bytes(shape, 1, bits) / shape.layers
    return Timings(
        model=model,
        recipe=recipe,
        device=HERE,
        threads=threads,
        hidden_size=config.hidden_size,
        memory_bandwidth_gb_s=rate,
        hand_over_ms=between_ms + sending_ms,
        contexts=list(contexts),
        prompts=list(prompts),
        parts=["embedding", *(f"block {place}" for place in range(stage.blocks)), "head"],
        decode_ms=[list(line) for line in zip(*decode, strict=True)],
        prefill_ms=[list(line) for line in zip(*prefill, strict=True)],
        weight_bytes=[float(held(module)) for module in stage.modules()],
        cache_bytes=[0.0, *[cache] * stage.blocks, 0.0],
    )


class _Watch:
    """Times every part of a stage while it reads. The last number is what lies between the parts."""

    def __init__(self, stage: Stage) -> None:
        self.stage, self.parts = stage, stage.modules()
        self.began, self.spent = [0.0] * len(self.parts), [0.0] * len(self.parts)
        for place, module in enumerate(self.parts):
            module.register_forward_pre_hook(partial(self._begin, place))
            module.register_forward_hook(partial(self._end, place))

    def _begin(self, place: int, *_: object) -> None:
        self.began[place] = time.perf_counter()

    def _end(self, place: int, *_: object) -> None:
        self.spent[place] = time.perf_counter() - self.began[place]

    def read(self, tokens: int, position: int) -> list[float]:
        """Milliseconds of every part, and of the rest, for so many tokens at a position; 0 begins anew."""
        if position == 0:
            self.stage.forget()
        ids = (torch.arange(tokens) * 7 + 11) % self.stage.model.config.get_text_config().vocab_size
        time.sleep(PAUSE_S)
        started = time.perf_counter()
        self.stage.read(ids, position)
        whole = time.perf_counter() - started
        return [1e3 * one for one in (*self.spent, whole - sum(self.spent))]


def _medians(lines: list[list[float]]) -> list[float]:
    return [statistics.median(times) for times in zip(*lines, strict=True)]


def count_of(folder: Path) -> int:
    """Parts of a variant: its blocks, embedding and head."""
    return len(block_list(skeleton(load_config(folder)))[1]) + 2


def held(module: nn.Module) -> int:
    """Bytes of the weights of a module."""
    return sum(one.nbytes for one in (*module.parameters(), *module.buffers()))


def sending(hidden_size: int, shaped: bool = True) -> float:
    """Milliseconds from one thread to another of this machine for one hidden state, over TCP, beside those of a link.

    shaped: through a proxy, as where this machine plays all devices. Each waits for the other, as stages do.
    """
    here, there = socket.create_server((LOCAL, 0)), torch.ones(1, hidden_size)

    def echo() -> None:
        connection, _ = here.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with connection:
            while (message := wire.receive(connection)) is not None:
                states = wire.decoded(message.payload, message.wire, message.tokens, hidden_size)
                wire.send(connection, message.with_states(states, message.wire))

    cold = torch.ones(COLD)
    with here, ExitStack() as stack:
        threading.Thread(target=echo, daemon=True).start()
        times, address = [], here.getsockname()
        if shaped:
            proxies = Proxies()
            stack.callback(proxies.close)
            address = LOCAL, proxies.open(FAST, *address).listening
        with wire.connect(*address) as connection:
            for _ in range(SENDS):
                cold.sum()
                started = time.perf_counter()
                wire.send(connection, Message(Kind.STATES, tokens=1).with_states(there, "float32"))
                wire.decoded(wire.receive(connection).payload, "float32", 1, hidden_size)
                times.append(time.perf_counter() - started)
    return 1e3 * statistics.median(times) / 2


@contextmanager
def _on(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
