"""What every process of the project does before its first tensor: check the stack, quiet it, tune it.

Importing this module imports neither torch nor anything built on it, so that `check_stack` can speak before a broken
set of packages does.
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from distrec.errors import InputError

FITTING = {"torch": "2.13", "torchrec": "1.8", "fbgemm-gpu": "1.8", "fbgemm-gpu-cpu": "1.8"}
_RECORDED = ("distrec", *FITTING, "torchmetrics", "tensordict", "deepspeed", "ray", "pyarrow", "numpy", "transformers")

# Ray trains in a thread that is not the main one. glibc would give it heaps of its own, of at most 64 MiB, which
# `tune_process` does not reach: a step that allocates a few large outputs took a fifth longer.
WORKER_ENVIRONMENT = {"MALLOC_ARENA_MAX": "1"}

_LOOK_SECONDS = 5.0  # between two looks at whether the cluster lives

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # parameter numbers of glibc's mallopt


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def check_stack() -> None:
    """Refuse packages that can not work together; reads their metadata only.

    torch, torchrec and fbgemm share one binary interface: another version of one fails at import with an undefined
    symbol, or later with a missing operator. The CPU and CUDA builds of fbgemm overwrite each other's files.

    Raises:
        InputError: names the versions found, the fitting ones, and the remedy.
    """
    found = {package: _installed(package) for package in FITTING}
    fits = all(
        number is None or number.startswith(f"{FITTING[package]}.") for package, number in found.items()
    ) and bool(found["torch"] and found["torchrec"])
    one_fbgemm = (found["fbgemm-gpu"] is None) != (found["fbgemm-gpu-cpu"] is None)
    if fits and one_fbgemm:
        return
    listed = ", ".join(f"{package} {number or 'missing'}" for package, number in found.items())
    raise InputError(
        f"the installed packages do not fit together ({listed}): distrec needs torch {FITTING['torch']}.*, "
        f"torchrec {FITTING['torchrec']}.* and exactly one of fbgemm-gpu and fbgemm-gpu-cpu {FITTING['fbgemm-gpu']}.*; "
        "remove .venv and run 'make env'."
    )


def versions() -> dict[str, str]:
    """Python and the packages that decide a run's numbers, as far as installed: name to version."""
    found = {package: _installed(package) for package in _RECORDED}
    return {"python": platform.python_version()} | {name: number for name, number in found.items() if number}


def quiet() -> None:
    """Keep what the libraries say to their own developers off the terminal; their warnings of substance stay.

    Call it before they are imported: some of them speak while they are.
    """
    logging.getLogger().addFilter(_not_fbgemm_info)
    logging.getLogger("DeepSpeed").addFilter(_not_accelerator_choice)
    logging.getLogger("torchrec").setLevel(logging.ERROR)  # it warns of every DENSE kernel
    for name in ("ray._private", "ray.train", "ray.tune"):  # "ray" itself is set again by its import
        logging.getLogger(name).setLevel(logging.WARNING)
    # It warns that a cluster is protected.
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    # DeepSpeed and TorchRec call collectives by names that this torch has begun to rename.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"ray\._private\.worker")


def _not_fbgemm_info(record: logging.LogRecord) -> bool:
    # fbgemm logs a dozen lines per table straight to the root logger, so neither a name nor a level selects them.
    return record.levelno >= logging.WARNING or "fbgemm_gpu" not in record.pathname


def _not_accelerator_choice(record: logging.LogRecord) -> bool:
    return "Setting accelerator to CPU" not in record.getMessage()


def tune_process(threads: int) -> None:
    """Give this process `threads` tensor threads and memory that large outputs reuse; call it before the first of them.

    By default glibc maps every block above 32 MiB anew and returns it when freed, so that each large output pays for
    its page faults again: adding two [26495, 448] matrices takes 22 ms in fresh memory and 2.6 ms in memory kept.
    Mapping is therefore switched off and so is trimming: resident memory stays at its peak. torch's switch aligns
    outputs of 2 MiB and more to 2 MiB (and lets the kernel back them with huge pages). Without it the aligned
    allocator's small left-overs keep freed blocks from joining, and a few large outputs grow into many.
    """
    os.environ["THP_MEM_ALLOC_ENABLE"] = "1"  # read by torch at its first large allocation
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, -1)

    import torch

    torch.set_num_threads(threads)


@contextmanager
def ray_cluster(runtime_env: dict[str, Any] | None = None) -> Iterator[None]:
    """The cluster that is connected or that RAY_ADDRESS names; otherwise a local one that ends with the block.

    Args:
        runtime_env: of all processes that this one starts there, where it is not connected yet.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    dashboard = None if address else False
    on_term = signal.getsignal(signal.SIGTERM)
    ray.init(
        address or "local",
        include_dashboard=dashboard,
        logging_level=logging.ERROR,
        log_to_driver=False,
        runtime_env=runtime_env,
    )
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_term)  # Ray's own would end this process with status 1
    try:
        yield
    finally:
        ray.shutdown()


def on_cluster(work: Callable[[], object]) -> None:
    """Run `work` off the main thread, so that Ray leaves signals to this process, and raise what it raises.

    Raises:
        RuntimeError: the connected Ray node died, which Ray's own libraries would wait out without end.
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
        if time.monotonic() - looked > _LOOK_SECONDS:
            looked = time.monotonic()
            if not any(found["NodeID"] == node and found["Alive"] for found in ray.nodes()):
                raise RuntimeError("the Ray node of this process died; the same command continues.")
    if failures:
        raise failures[0]
