"""Setup of every process before its first tensor: checks packages, silences logs, tunes memory.

Importing this module imports neither torch nor anything built on it, so that `check_stack` can report packages that do
not fit together before importing them fails.
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import warnings
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from distrec.errors import InputError

FITTING = {"torch": "2.13", "torchrec": "1.8", "fbgemm-gpu": "1.8", "fbgemm-gpu-cpu": "1.8"}
_RECORDED = ("distrec", *FITTING, "torchmetrics", "tensordict", "deepspeed", "ray", "pyarrow", "numpy", "transformers")

# Ray Train trains in a thread that is not the main one. glibc would give that thread its own heaps of at most 64 MiB,
# to which the settings of `tune_process` do not apply. A step that allocates a few large outputs took a fifth longer.
WORKER_ENVIRONMENT = {"MALLOC_ARENA_MAX": "1"}

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # parameter numbers of glibc's mallopt


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def check_stack() -> None:
    """Check that the installed packages work together; reads only their metadata.

    torch, torchrec and fbgemm share one binary interface. If one of them has another version, the import fails with an
    undefined symbol, or a later call with a missing operator. The CPU and CUDA builds of fbgemm overwrite each other's
    files.

    Raises:
        InputError: the packages do not fit together; the message names the found and the required versions.
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
    """Versions by name: Python and those installed packages that can affect the results of a run."""
    found = {package: _installed(package) for package in _RECORDED}
    return {"python": platform.python_version()} | {name: number for name, number in found.items() if number}


def quiet() -> None:
    """Hide log lines and warnings of libraries that users cannot act on; other warnings remain.

    Call it before the libraries are imported, since some of them log during import.
    """
    logging.getLogger().addFilter(_not_fbgemm_info)
    logging.getLogger("DeepSpeed").addFilter(_not_accelerator_choice)
    logging.getLogger("torchrec").setLevel(logging.ERROR)  # it warns about every DENSE kernel
    for name in ("ray._private", "ray.train", "ray.tune"):  # importing ray sets the level of "ray" itself
        logging.getLogger(name).setLevel(logging.WARNING)
    # Ray warns that the cluster uses authentication.
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    # DeepSpeed and TorchRec call collectives by names that this version of torch deprecates.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"ray\._private\.worker")


def _not_fbgemm_info(record: logging.LogRecord) -> bool:
    # fbgemm logs a dozen lines per table to the root logger, so no logger name can be used to silence them.
    return record.levelno >= logging.WARNING or "fbgemm_gpu" not in record.pathname


def _not_accelerator_choice(record: logging.LogRecord) -> bool:
    return "Setting accelerator to CPU" not in record.getMessage()


def total_memory() -> int:
    """Bytes of memory of this machine, or of this container if it may use less."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # no such file, or "max"
            whole = min(whole, int(Path(file).read_text(encoding="ascii")))
    return whole


def check_fits(needed: int, what: str, remedy: str, place: str = "this machine") -> None:
    """Refuse what certainly exceeds the memory of this machine, before anything is allocated.

    Args:
        needed: the fewest bytes that it takes.
        what: the settings that decide about it, for the message.
        remedy: what to do, as a command.
        place: this machine, for the message.

    Raises:
        InputError: the machine has less memory.
    """
    if needed > (there := total_memory()):
        raise InputError(
            f"{what} need at least {needed / 1e9:,.1f} GB of memory, but {place} has {there / 1e9:,.1f} GB; {remedy}."
        )


def tune_process(threads: int) -> None:
    """Set the number of tensor threads and let large outputs reuse memory; call it before the first large allocation.

    By default glibc maps a new region for every block above 32 MiB and unmaps it when freed, so each large output
    causes page faults again: adding two [26495, 448] matrices takes 22 ms in new memory and 2.6 ms in reused memory.
    Mapping and trimming are therefore turned off, so resident memory stays at its peak until `release_memory`. With
    THP_MEM_ALLOC_ENABLE, torch aligns outputs of 2 MiB and more to 2 MiB, and the kernel may use huge pages. Without
    it, small gaps left by the aligned allocator keep freed blocks from being merged, and the heap fragments.
    """
    os.environ["THP_MEM_ALLOC_ENABLE"] = "1"  # read by torch at its first large allocation
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, -1)

    import torch

    torch.set_num_threads(threads)


def release_memory() -> None:
    """Give the pages of this process that hold nothing back to the system.

    Blocks whose size changes from step to step do not fit the gaps that other work leaves, and the other way round. The
    resident memory of SASRec's workers grew by a tenth in each of four epochs. With this after the steps of every
    epoch, it stays as it is in the second one.
    """
    ctypes.CDLL(None).malloc_trim(0)
