"""Ray starts the workers: on this machine, or with an address on those of a cluster.

A cluster's machines say which device of the fleet they are: `ray start --resources='{"laptop": 1}'`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from edgelab.deployments.partition.seats import ClusterError, Start
from edgelab.deployments.partition.worker import Worker
from edgelab.errors import EdgeLabError, to_install
from edgelab.network import LOCAL

STORE_BYTES = 80 * 1024 * 1024  # Ray's shared memory, its least; nothing large passes through it
# Nothing is reported, and workers are no less important than what else runs: Ray's own are, at a niceness of 15.
SETTINGS = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
# A cluster of our own takes no orders from others; Ray's default, which it would announce every time.
ALONE = {"RAY_AUTH_MODE": "token"}
SHARE = 0.001  # of a device's resource: it says where, not how much


class RayMissing(EdgeLabError):
    """Ray is not installed."""

    def __init__(self) -> None:
        super().__init__(
            f"Ray, which starts the stages, is not installed; `{to_install('cluster')}` in the project's folder "
            "installs it."
        )


class Actor:
    """A worker as an actor."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def begin(self, method: str, *arguments: Any) -> Callable[[], Any]:
        import ray

        answer = getattr(self._actor, method).remote(*arguments)
        return lambda: ray.get(answer)

    def kill(self) -> None:
        import ray

        if ray.is_initialized():
            ray.kill(self._actor, no_restart=True)


class _Worker(Worker):
    """On a machine of a cluster: listens at the address by which the others know it."""

    def __init__(self, threads: int) -> None:
        super().__init__(threads, host=here())


def here() -> str:
    """The address of this machine in its cluster."""
    import ray

    return ray.util.get_node_ip_address()


@contextmanager
def started(address: str | None = None, threads: int = 1) -> Iterator[Start]:
    """What starts workers, while the context lasts. address: of a running cluster, or "auto"; None starts Ray here.

    threads: of each worker; on this machine each has cores of its own as far as there are any.
    Raises RayMissing, and ClusterError where no cluster answers.
    """
    with _environment(SETTINGS if address else SETTINGS | ALONE), _started(address, threads) as start:
        yield start


@contextmanager
def _environment(wanted: dict[str, str]) -> Iterator[None]:
    """Variables that were not set are, for a while: what this process starts later is told nothing of them."""
    added = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


@contextmanager
def _started(address: str | None, threads: int) -> Iterator[Start]:
    try:
        import ray
    except ImportError:
        raise RayMissing from None
    ours = not ray.is_initialized()
    if ours:
        here = {
            "include_dashboard": False,
            "num_cpus": os.cpu_count(),
            "object_store_memory": STORE_BYTES,
            "_node_ip_address": LOCAL,
        }
        try:
            ray.init(
                address=address or "local",
                log_to_driver=False,
                configure_logging=False,
                **({} if address else here),
            )
        except (ConnectionError, ValueError) as error:
            raise ClusterError(
                f"No Ray cluster answers at {address} ({str(error).splitlines()[0]}); start one with "
                "`ray start --head`."
            ) from None
    count = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}

    def start(name: str, place: int) -> Actor:
        options = {"num_cpus": 0, "max_restarts": 0, "max_concurrency": 2, "runtime_env": {"env_vars": count}}
        if address and name not in ray.cluster_resources():
            raise ClusterError(
                f"No machine of the cluster is called {name}; start it with "
                f"ray start --resources '{{\"{name}\": 1}}'."
            )
        if address:
            options["resources"] = {name: SHARE}
        actor = ray.remote(_Worker if address else Worker).options(**options)
        return Actor(actor.remote(threads) if address else actor.remote(threads, place))

    try:
        yield start
    finally:
        if ours:
            ray.shutdown()
