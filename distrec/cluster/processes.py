"""Sends signals to worker processes on any host of the connected cluster, as `distrec drill` does."""

from __future__ import annotations

import os
from pathlib import Path

_SECONDS = 60.0  # that Ray may take to start a process on a busy host


class Unreachable(Exception):
    """A process could not be sent a signal; the message says why, as the end of a sentence about the process."""


def signal_worker(node: str, process: int, signum: int) -> None:
    """Send a signal to a worker of Ray Train.

    Args:
        node: Ray's id of its host.
        process: number of its process there.
        signum: the signal.

    Raises:
        Unreachable: the process is gone, or is no worker of Ray Train; or nothing could run on its host.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(node, soft=False)
    task = ray.remote(send).options(num_cpus=0, max_retries=0, scheduling_strategy=there).remote(process, signum)
    try:
        reason = ray.get(task, timeout=_SECONDS)
    except ray.exceptions.RayError as error:
        ray.cancel(task)  # it must not run later
        raise Unreachable(
            f"could not be sent a signal, because its host took no task ({type(error).__name__})"
        ) from None
    if reason is not None:
        raise Unreachable(reason)


def send(process: int, signum: int) -> str | None:
    """Send a signal to a worker of Ray Train on this host; return why not, if it cannot be done."""
    from distrec.cluster.ray_internals import TRAIN_WORKER

    try:
        if TRAIN_WORKER.encode() not in Path(f"/proc/{process}/cmdline").read_bytes():
            return "is no worker of Ray Train any more"
        os.kill(process, signum)
    except OSError:
        return "is gone"
    return None
