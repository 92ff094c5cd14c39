"""Encode shards in parallel in Ray actors, each of which holds the encoders, or in this process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from distrec.cluster.capacity import Ask, wait_for
from distrec.cluster.connection import ray_cluster
from distrec.data.storage import open_folder
from distrec.encoders.base import Encoder
from distrec.encoders.cache import keep_part
from distrec.errors import InputError

_WAIT = 600.0  # seconds to wait for a cluster with enough CPUs


@dataclass(frozen=True)
class Shard:
    """Contents that are encoded and cached together, and their hashes."""

    hashes: list[bytes]
    contents: list[Any]


@dataclass(frozen=True)
class Job:
    """What a worker needs to know besides the shard."""

    encoder: Encoder
    cache: str  # cache folder of the encoder
    batch: int | None

    def run(self, shard: Shard) -> tuple[str, int]:
        """Encode a shard and write it to the cache.

        Returns:
            File name of the new part, and its number of rows.
        """
        with np.errstate(over="ignore"):  # values too large for float16 become infinite, hence missing
            values = self.encoder.encode(shard.contents, self.batch).astype(np.float16)
        tokens = values.reshape(len(values), self.encoder.tokens, self.encoder.width)
        count = np.logical_not(np.isnan(tokens).all(axis=2)).sum(axis=1, dtype=np.int32)
        behind = np.arange(self.encoder.tokens) >= count[:, None]
        missing = (count == 0) | np.logical_not(np.isfinite(tokens).all(axis=2) | behind).any(axis=1)
        tokens[behind | missing[:, None]], count[missing] = 0, 0
        kept = count if self.encoder.tokens > 1 else None
        return keep_part(open_folder(self.cache), shard.hashes, values, missing, kept), len(values)


class _Worker:
    """Encodes shards, as a Ray actor or in this process."""

    def __init__(self, threads: int):
        import torch

        torch.set_num_threads(threads)
        self._jobs: dict[str, Job] = {}

    def run(self, job: Job, shard: Shard) -> tuple[str, int]:
        """As `Job.run`, but the model is loaded only once, however often the job is sent."""
        return self._jobs.setdefault(job.cache, job).run(shard)


class Pool:
    """Workers that start with the first shard, so a run with nothing to encode starts none.

    Args:
        workers: Number of Ray actors; 0 encodes in this process.
        threads: CPU threads, and CPUs of the cluster, per worker. Each worker also takes a GPU if the cluster has
            enough of them.
    """

    def __init__(self, workers: int, threads: int):
        self._workers, self._threads = workers, threads
        self._actors: list[Any] = []
        self._cluster = ExitStack()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self._cluster.close()

    def run(self, job: Job, shards: Iterator[Shard]) -> Iterator[tuple[str, int]]:
        """Encode `shards` and yield the results of `Job.run`, in any order.

        At most two shards per worker are in flight, which bounds memory.

        Raises:
            InputError: the workers need more CPUs than the cluster has.
        """
        first = next(shards, None)
        if first is None:
            return
        if not self._actors:
            self._actors = self._start() if self._workers else [_Worker(self._threads)]
        shards = chain([first], shards)
        if not self._workers:
            for shard in shards:
                yield self._actors[0].run(job, shard)
            return

        import ray

        free = self._actors * 2  # each actor works on one shard while its next one is sent
        running: dict[Any, Any] = {}

        def finished() -> tuple[str, int]:
            (done,), _ = ray.wait(list(running))
            free.append(running.pop(done))
            try:
                result: tuple[str, int] = ray.get(done)
            except ray.exceptions.RayTaskError as error:
                raise error.cause if isinstance(error.cause, InputError) else error from None
            return result

        for shard in shards:
            if not free:
                yield finished()
            actor = free.pop(0)
            running[actor.run.remote(job, shard)] = actor
        while running:
            yield finished()

    def _start(self) -> list[Any]:
        import ray

        fixed = self._cluster.enter_context(ray_cluster())
        what = f"encode has {self._workers} workers with {self._threads} threads"
        wait_for(Ask(self._workers, self._workers, self._threads, what, "lower --workers or --threads"), _WAIT, fixed)
        actor = ray.remote(_Worker).options(
            num_cpus=self._threads,
            num_gpus=int(ray.cluster_resources().get("GPU", 0) >= self._workers),
            max_restarts=3,
            max_task_retries=3,
        )
        return [actor.remote(self._threads) for _ in range(self._workers)]
