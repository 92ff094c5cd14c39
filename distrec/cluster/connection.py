"""Connects a process to a Ray cluster, and runs work on it without Ray handling the signals of the process."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from distrec.errors import WorkersFailed

_LOOK_SECONDS = 5.0  # between two checks that the Ray node is alive


@contextmanager
def ray_cluster(runtime_env: dict[str, Any] | None = None, other: str = "local") -> Iterator[bool]:
    """Use the Ray cluster that is connected or that RAY_ADDRESS names, or else a local one that ends with the block.

    Args:
        runtime_env: Ray's runtime environment for the processes that this one starts; ignored if already connected.
        other: Ray's address to use in place of a new local cluster.

    Yields:
        Whether the cluster is local and new, so that no other machine can join it.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    if ray.is_initialized():
        yield False
        return
    address = os.environ.get("RAY_ADDRESS") or other
    local = address == "local"
    on_term = signal.getsignal(signal.SIGTERM)
    ray.init(
        address,
        include_dashboard=False if local else None,
        logging_level=logging.ERROR,
        log_to_driver=False,
        runtime_env=runtime_env,
    )
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_term)  # Ray's handler would exit with status 1
    try:
        yield local
    finally:
        ray.shutdown()


def on_cluster(work: Callable[[], object], meanwhile: Callable[[], object] | None = None) -> None:
    """Run `work` in another thread, so that Ray does not handle this process's signals, and raise what it raises.

    Args:
        work: the work.
        meanwhile: called here about five times per second while `work` runs.

    Raises:
        WorkersFailed: the connected Ray node died; Ray's own libraries would wait for it forever.
    """
    import ray

    failures: list[BaseException] = []

    def attempt() -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    node, looked = ray.get_runtime_context().get_node_id(), time.monotonic()
    while thread.is_alive():
        thread.join(0.2)
        if meanwhile is not None:
            meanwhile()
        if time.monotonic() - looked > _LOOK_SECONDS:
            looked = time.monotonic()
            if not any(found["NodeID"] == node and found["Alive"] for found in ray.nodes()):
                raise WorkersFailed("the Ray node of this process died; the same command continues.")
    if failures:
        raise failures[0]
