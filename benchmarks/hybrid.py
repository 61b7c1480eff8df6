"""Hybrid inference: what links, drafts, capacity, cuts and attacks have to hold, on the embedded model.

`python -m benchmarks.hybrid [PART ...] [--quick] [--write]`. transfers takes 2 minutes, identity 13, drafting 20,
capacity 4, wire 2 and exposure 25 on two quiet cores; --quick shrinks counts, for seeing that a part works. --write
writes what exposure finds to data/reference/exposure.csv.
"""

from __future__ import annotations

import argparse
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from itertools import product
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.capacity import capacity
from benchmarks.speculation import MODEL, Rows, against, drafting, identity
from edgelab import corpora, network, reference
from edgelab.deployments.hybrid import inversion, prompts
from edgelab.deployments.hybrid.split import FORMATS, cut_behind, delta_nll, payload_bytes, through
from edgelab.deployments.partition.stage import Stage
from edgelab.measure import perplexity
from edgelab.measure.protocols import protocol
from edgelab.network import LOCAL, Link, Proxies

SIZE, RATES, TRANSFERS = 1_000_000, (1, 10, 50), 3  # bytes, Mbps, times each
ROUND_TRIPS = 20
SLOW_MS = 1000  # a link whose round trip is as long is left out
CUTS, WINDOWS = (1, 5, 15, 25), 8
EXPOSED_CUTS, EXPOSED, PROMPT = (1, 5, 15), 2, 32  # prompts of each kind, and their tokens
KNOWN = "<|im_start|>user\n"  # what the attacker need not guess
TABLE = Path("data/reference/exposure.csv")


# Links


@contextmanager
def connected(link: Link) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Both ends of a connection over a link: the device's, and the far one."""
    with socket.create_server((LOCAL, 0)) as far, closing(Proxies()) as proxies:
        proxy = proxies.open(link, *far.getsockname())
        with socket.create_connection((LOCAL, proxy.listening)) as near, far.accept()[0] as there:
            for end in (near, there):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            yield near, there


def transfer_s(link: Link, size: int, way: str) -> float:
    """Seconds from when the first byte is sent to when the last one has arrived."""
    with connected(link) as (near, there), ThreadPoolExecutor(1) as other:
        sender, receiver = (near, there) if way == "up" else (there, near)

        def arrived() -> float:
            left = size
            while left:
                left -= len(receiver.recv(65_536))
            return time.perf_counter()

        arrival = other.submit(arrived)
        began = time.perf_counter()
        sender.sendall(bytes(size))
        return arrival.result() - began


def round_trips_ms(link: Link, count: int) -> list[float]:
    """Of single bytes, one after the other."""
    with connected(link) as (near, there):

        def echo() -> None:
            while said := there.recv(1):
                there.sendall(said)

        answering = threading.Thread(target=echo)
        answering.start()
        found = []
        for _ in range(count):
            began = time.perf_counter()
            near.sendall(b"?")
            near.recv(1)
            found.append(1e3 * (time.perf_counter() - began))
        near.shutdown(socket.SHUT_WR)
        answering.join()
        return found


def transfers(quick: bool = False) -> Rows:
    """1 MB each way through the proxy, and round trips over every link that has one below a second."""
    size = SIZE // 10 if quick else SIZE
    for rate, way in product(RATES, ("up", "down")):
        link = Link("made", rate, rate, round_trip_ms=20)
        took = statistics.median(transfer_s(link, size, way) for _ in range(1 if quick else TRANSFERS))
        computed = 1e3 * link.up_s(size)
        yield (
            f"{size / 1e6:g} MB {way} at {rate} Mbps, round trip 20 ms: ms, computed {computed:.1f}",
            against(1e3 * took, computed),
            "within 10 %",
        )
    for link in network.links().values():
        if link.round_trip_ms >= SLOW_MS:
            continue
        found = round_trips_ms(link, 3 if quick else ROUND_TRIPS)
        middle = statistics.median(found)
        yield (
            f"round trip over {link.name}: ms, set {link.round_trip_ms:g}",
            f"{middle:.1f} ({middle - link.round_trip_ms:+.1f}; {min(found):.1f} to {max(found):.1f})",
            "within 5 ms",
        )


# What a cut costs, and what it gives away


def wire(quick: bool = False) -> Rows:
    """NLL with the states of a cut rounded, less NLL without."""
    cuts, count = (CUTS[:1], 1) if quick else (CUTS, WINDOWS)
    model, tokenizer = _reference()
    rules = protocol("edgelab-512")
    text = corpora.tokenize("wiki", tokenizer)
    windows = [one.ids for one in perplexity.windows(text, rules, tokenizer, count)]
    size = model.config.hidden_size
    for one in delta_nll(cut_behind(model, cuts), windows):
        n_bytes, most = (payload_bytes(size, which) for which in (one.wire, "float32"))
        yield (
            f"states behind layer {one.cut} in {one.wire}, {n_bytes:.0f} bytes a token, {n_bytes / most:.2f} of "
            f"float32: change of NLL, {count} windows",
            f"{one.delta_nll:+.4f}",
            "",
        )


def attacked(tokenizer: PreTrainedTokenizerBase, count: int) -> Iterator[tuple[str, list[int]]]:
    """Prompts of each kind, PROMPT tokens each, and no two of `privacy` with the same kind of personal data in them."""
    for corpus in ("stories", "wiki"):
        ids = corpora.tokenize(corpus, tokenizer, tokens=count * 10 * PROMPT).ids
        for begin in range(0, count * 10 * PROMPT, 10 * PROMPT):
            yield corpus, ids[begin : begin + PROMPT].tolist()
    left: dict[str, list[int]] = {}
    for one in prompts.load("held_out"):
        ids = tokenizer.encode(one.text, add_special_tokens=False)
        if len(ids) < PROMPT or not one.entities:
            continue
        entity = one.entities[0]
        if len(tokenizer.encode(one.text[: entity.end], add_special_tokens=False)) <= PROMPT:
            left.setdefault(entity.kind, ids[:PROMPT])
    for ids in list(left.values())[:count]:
        yield "privacy", ids


def exposures(quick: bool = False) -> Iterator[dict[str, str | float]]:
    """Rows of the table: one for each prompt, cut and format, with shares of the prompt's tokens and candidates tried.

    nearest: each state is compared with the embedding; lone: with the states of every token alone behind KNOWN.
    """
    model, tokenizer = _reference()
    known = tokenizer.encode(KNOWN, add_special_tokens=False)
    sent = list(attacked(tokenizer, 1 if quick else EXPOSED))
    for cut in EXPOSED_CUTS[:1] if quick else EXPOSED_CUTS:
        edge, cloud = cut_behind(model, [cut])
        table = inversion.lone_states(edge, known)
        for (kind, ids), which in product(sent, FORMATS):
            found = inversion.exposure(edge, cloud, ids, which, known)
            yield {
                "kind": kind,
                "cut": cut,
                "wire": which,
                "nearest": found.nearest,
                "lone": lone(edge, table, known, ids, which),
                "search": found.searched,
                "tried": round(found.tried, 1),
                "seconds": round(found.seconds, 2),
            }


def lone(edge: Stage, table: Tensor, known: list[int], ids: list[int], which: str) -> float:
    """Share of tokens whose state is closest to their own in a table of `lone_states` behind the same ones."""
    edge.forget()
    states = edge.read(torch.tensor([*known, *ids]), 0, every=True)
    edge.forget()
    guessed = inversion.nearest(through(states, which)[len(known) :], table)
    return sum(one == other for one, other in zip(guessed, ids, strict=True)) / len(ids)


def exposure(quick: bool = False, write: bool = False) -> Rows:
    """Shares of a prompt's tokens that whoever runs the cloud reads back from hidden states."""
    found = pd.DataFrame(exposures(quick))
    if write:
        TABLE.parent.mkdir(parents=True, exist_ok=True)
        found.to_csv(TABLE, index=False, lineterminator="\n")
    means = found.groupby(["cut", "wire"], sort=False).mean(numeric_only=True)
    for (cut, which), one in means.iterrows():
        yield (
            f"tokens of {len(found) // len(means)} prompts read back behind layer {cut} from {which}: "
            "by the nearest embedding, by the nearest state of a lone token, by the search",
            f"{one.nearest:.1%}, {one.lone:.1%}, {one.search:.1%} ({one.tried:.0f} tried a token, "
            f"{one.seconds:.1f} s a prompt)",
            "at least 99 % by the search" if which == "float32" else "",
        )


def _reference() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    found = reference.load(MODEL)
    return found.model, found.tokenizer


PARTS: dict[str, Callable[[bool], Rows]] = {
    "transfers": transfers,
    "identity": identity,
    "drafting": drafting,
    "capacity": capacity,
    "wire": wire,
    "exposure": exposure,
}


def rows() -> Rows:
    for part in PARTS.values():
        yield from part(False)


def main() -> None:
    reader = argparse.ArgumentParser(prog="python -m benchmarks.hybrid", description=__doc__.split("\n")[0])
    reader.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; all by default")
    reader.add_argument("--quick", action="store_true", help="shrink counts, to see that it works")
    reader.add_argument("--write", action="store_true", help=f"write what exposure finds to {TABLE}")
    given = reader.parse_args()
    if unknown := [part for part in given.parts if part not in PARTS]:
        reader.error(f"no part is called {', '.join(unknown)}; there are {', '.join(PARTS)}")
    if given.write and given.quick:
        reader.error("--quick measures too little to be written")
    for name in given.parts or PARTS:
        found = (
            exposure(write=given.write) if name == "exposure" and given.write else PARTS[name](given.quick)
        )
        for what, value, bound in found:
            print(what, "|", value, "|", bound, flush=True)


if __name__ == "__main__":
    main()
