import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.distributed import run_workers

pytestmark = pytest.mark.multiprocess


def total(value: int) -> tuple[int, int, int]:
    values = torch.tensor([value + dist.get_rank()])
    dist.all_reduce(values)
    return int(values), dist.get_rank(), torch.get_num_threads()


def stumble() -> None:
    if dist.get_rank() == 1:
        raise ValueError("stumbled")
    dist.barrier()


def hang() -> int:
    time.sleep(600)
    return os.getpid()


def test_results_come_by_rank():
    assert run_workers(total, 3, 10) == [(33, rank, 1) for rank in range(3)]


def test_an_error_in_one_worker_ends_all_and_is_told():
    started = time.monotonic()
    with pytest.raises(RuntimeError, match="ValueError: stumbled"):
        run_workers(stumble, 2)
    assert time.monotonic() - started < 60


def test_a_hanging_worker_is_bounded():
    with pytest.raises(TimeoutError, match="hang with 2 workers took more than 8 s"):
        run_workers(hang, 2, timeout=8)
