import os
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.distributed import run_workers
from tests.preload import LOADED

pytestmark = pytest.mark.multiprocess


def total(value: int) -> tuple[int, int, int]:
    values = torch.tensor([value + dist.get_rank()])
    dist.all_reduce(values)
    return int(values), dist.get_rank(), torch.get_num_threads()


def origin() -> tuple[list[str], list[str], str | None]:
    """The libraries that this worker lacks, the server's threads besides its main one, and a variable."""
    tasks = Path(f"/proc/{os.getppid()}/task")
    threads = [(task / "comm").read_text().strip() for task in tasks.iterdir() if task.name != str(os.getppid())]
    return [name for name in LOADED if name not in sys.modules], threads, os.environ.get("DISTREC_TEST")


def stumble() -> None:
    if dist.get_rank() == 1:
        raise ValueError("stumbled")
    dist.barrier()


def hang() -> int:
    time.sleep(600)
    return os.getpid()


def test_results_are_ordered_by_rank():
    assert run_workers(total, 3, 10) == [(33, rank, 1) for rank in range(3)]


def test_workers_have_the_libraries_and_their_server_has_one_thread(monkeypatch: pytest.MonkeyPatch):
    """Forking a process with several threads may copy a lock that is never released; jemalloc handles its own."""
    monkeypatch.setenv("DISTREC_TEST", "as it is now")  # set after the server may have started
    for missing, threads, variable in run_workers(origin, 2):
        assert (missing, variable) == ([], "as it is now")
        assert set(threads) <= {"jemalloc_bg_thd"}


def test_an_error_in_one_worker_ends_all_and_is_raised():
    started = time.monotonic()
    with pytest.raises(RuntimeError, match="ValueError: stumbled"):
        run_workers(stumble, 2)
    assert time.monotonic() - started < 60


def test_a_hanging_worker_ends_at_the_timeout():
    with pytest.raises(TimeoutError, match="hang with 2 workers took more than 8 s"):
        run_workers(hang, 2, timeout=8)
