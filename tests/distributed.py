"""Run a function in several gloo processes, or share one Ray cluster of 2 CPUs between tests.

Workers are forked from a server process that has imported the heavy libraries once, since these imports take 3 to 7 s
of CPU in every new interpreter. The server runs no tensor operation and starts no thread, so forking it is safe. Apart
from the imported libraries, a worker is in the state of a new interpreter.
"""

import multiprocessing
import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import torch.distributed as dist


def run_workers(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 180) -> list[Any]:
    """Run `function(*args)` in `world_size` processes that share a gloo group.

    `function` must be importable (defined at the top level of a module); arguments and results are pickled. Each
    process has one thread. When one process fails, or after `timeout` seconds, all are killed.

    Returns:
        The results, by rank.

    Raises:
        RuntimeError: a process failed; the message has the tracebacks.
        TimeoutError: the processes took longer than `timeout`.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preload"])
    with TemporaryDirectory() as folder, socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", 0))  # kept open without listening, so that no other process gets this port
        port = probe.getsockname()[1]
        workers = [
            context.Process(
                target=_work, args=(function, rank, world_size, port, folder, args, dict(os.environ)), daemon=True
            )
            for rank in range(world_size)
        ]
        try:
            for worker in workers:
                worker.start()
            deadline = time.monotonic() + timeout
            while any(worker.is_alive() for worker in workers):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{function.__name__} with {world_size} workers took more than {timeout} s")
                if any(worker.exitcode for worker in workers):
                    break
                time.sleep(0.02)
        finally:
            for worker in workers:
                if worker.is_alive():
                    worker.kill()
                if worker.pid is not None:
                    worker.join()
        failed = [rank for rank, worker in enumerate(workers) if worker.exitcode]
        if failed:
            errors = [path.read_text() for path in sorted(Path(folder).glob("error-*"))]
            raise RuntimeError(f"workers {failed} of {world_size} failed:\n" + "\n".join(errors))
        return [pickle.loads(Path(folder, f"result-{rank}").read_bytes()) for rank in range(world_size)]


def _work(
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    port: int,
    folder: str,
    args: tuple[Any, ...],
    environment: dict[str, str],
) -> None:
    torch.set_num_threads(1)
    os.environ.clear()  # it comes from the server, as it was when the server started
    os.environ.update(
        environment,
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    try:
        dist.init_process_group("gloo")
        result = function(*args)
        Path(folder, f"result-{rank}").write_bytes(pickle.dumps(result))
        dist.barrier()  # no rank leaves while another still communicates
        dist.destroy_process_group()
    except BaseException:
        Path(folder, f"error-{rank}").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        os._exit(1)
    # The result is written. A normal exit would race with threads that DeepSpeed's process groups leave behind: about
    # once in a hundred runs it ends with "terminate called without an active exception".
    os._exit(0)


class SharedCluster:
    """A local Ray cluster of 2 CPUs that several tests use: commands in this process find it and do not stop it."""

    home: Path

    def __init__(self) -> None:
        self._stack: ExitStack | None = None

    def start(self) -> None:
        """Start it, unless it runs; then wait for free CPUs, which what an earlier test started may still hold."""
        import ray

        if self._stack is not None:
            deadline = time.monotonic() + 60
            while ray.available_resources().get("CPU") != ray.cluster_resources()["CPU"]:
                assert time.monotonic() < deadline, ray.available_resources()
                time.sleep(0.1)
            return

        self._stack = ExitStack()
        patch = self._stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("HOME", str(self.home))
        patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
        patch.setenv("OMP_NUM_THREADS", "1")
        self._stack.callback(ray.shutdown)
        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100_000_000)

    def stop(self) -> None:
        """Stop it, if it runs."""
        if self._stack is not None:
            self._stack.close()
            self._stack = None
