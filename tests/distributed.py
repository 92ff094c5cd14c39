"""Run a function in several gloo processes, or start a Ray cluster of a given size.

Workers are forked from a server process that has imported the heavy libraries once, since these imports take 7 s of CPU
in every new interpreter. The server runs no tensor operation and starts no thread, so forking it is safe. Apart from
the imported libraries, a worker is in the state of a new interpreter.
"""

import multiprocessing
import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

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


@contextmanager
def own_cluster(cpus: int) -> Iterator[None]:
    """Start a local Ray cluster with `cpus` CPUs, which the project's commands use and do not shut down."""
    import ray

    ray.init("local", num_cpus=cpus, include_dashboard=False, log_to_driver=False, object_store_memory=100_000_000)
    try:
        yield
    finally:
        ray.shutdown()
