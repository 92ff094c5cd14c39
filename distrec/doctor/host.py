"""Checks of this machine: packages, memory, threads, limits and interfaces."""

from __future__ import annotations

import os
import re
import resource
import shutil
import socket
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import psutil

from distrec.config.run import RunConfig
from distrec.doctor.finding import Finding, failed, not_applicable, passed, refused, size
from distrec.doctor.limits import cores, memory_limit
from distrec.errors import InputError, first_few, shown
from distrec.runtime import FITTING, check_stack, total_memory, versions

LOCKS = Path(__file__).parents[2] / "locks"
SHARED_MEMORY = "/dev/shm"  # where Ray keeps its objects
# What Ray does by default: the part of the free memory that its objects get, and up to how much it also puts on a disk.
_OBJECTS, _ON_DISK = 0.3, 10e9
_FULL = 0.95  # of a disk is used: then Ray writes no objects to it
_OPEN_FILES = 8192  # Ray recommends at least as many
_WORKER, _RAY = 600 << 20, 1 << 30  # bytes that a worker takes before any data, and Ray's own processes


def packages() -> Finding:
    """Whether torch, torchrec and fbgemm fit together."""
    try:
        check_stack()
    except InputError as error:
        return refused("packages", error, "run 'make env'")
    found = versions()
    return passed("packages", ", ".join(f"{name} {found[name]}" for name in (*FITTING, "ray") if name in found))


def lock_file(locks: Path = LOCKS) -> Finding:
    """Whether the installed packages are those of the lock file."""
    name, kind = "lock file", "gpu" if "fbgemm-gpu" in versions() else "cpu"
    try:
        text = (locks / f"{kind}.txt").read_text(encoding="utf-8")
    except OSError:
        return not_applicable(name, "distrec is installed without its locks")
    wanted = dict(re.findall(r"^([\w.-]+)==([\w.+!-]+)", text, re.MULTILINE))
    installed = _installed()
    there = {package: installed.get(package.lower().replace("_", "-"), "missing") for package in wanted}
    other = [package for package, number in there.items() if number.partition("+")[0] != wanted[package]]
    if other:
        listed = (f"{package} {there[package]} in place of {wanted[package]}" for package in other)
        return failed(
            name, f"{len(other)} of {len(wanted)} packages differ from locks/{kind}.txt: "
            f"{first_few(listed, len(other))}", f"run 'make env LOCK={kind}'",
        )  # fmt: skip
    return passed(name, f"all {len(wanted)} packages are those of locks/{kind}.txt")


def _installed() -> dict[str, str]:
    """Versions of all installed packages, by name with hyphens."""
    from importlib.metadata import distributions

    return {
        re.sub(r"[-_.]+", "-", found.metadata["Name"]).lower(): found.version
        for found in reversed(list(distributions()))  # of two with one name, the first one is imported
        if found.metadata["Name"]
    }


def extension_locks(environment: Mapping[str, str]) -> Finding:
    """Whether a process died while it compiled an extension of torch: every later one waits for it without a word."""
    name = "extension locks"
    root = Path(
        environment.get("TORCH_EXTENSIONS_DIR")
        or Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torch_extensions"
    )
    locks = sorted(root.glob("**/lock")) if root.is_dir() else []
    stale = [lock for lock in locks if not _is_open(lock)]
    if stale:
        listed = first_few((f"'{lock}'" for lock in stale), len(stale))
        return failed(
            name,
            f"{listed}: no process of this host holds it",
            "delete it, unless another host that shares this folder is compiling: whoever needs the extension waits "
            "for it without end",
        )
    under_way = f"{len(locks)} build{'s' if len(locks) > 1 else ''} under way"
    return passed(name, under_way if locks else f"none in '{root}'")


def _is_open(path: Path) -> bool:
    """Whether a process of this host has the file open, as the one does that compiles; it may have ended by now."""
    try:
        wanted = path.stat()
    except OSError:
        return True
    for file in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.path.samestat(file.stat(), wanted):
                return True
        except OSError:  # another user's, or closed meanwhile
            continue
    return False


def shared_memory(folder: str = SHARED_MEMORY) -> Finding:
    """Whether Ray's objects fit into shared memory; otherwise Ray puts them on a disk, which is many times slower."""
    name = "shared memory"
    free, wanted = shutil.disk_usage(folder).free, min(_OBJECTS * _free_memory(), _ON_DISK)
    found = f"{size(free)} free in {folder}"
    if free < wanted:
        gib = int(wanted / 2**30) + 1
        return failed(
            name,
            f"{found}, but Ray's objects get {size(wanted)} of this machine's memory and would lie on a disk",
            f"give the container more (docker run --shm-size={gib}g; in Kubernetes an emptyDir of medium Memory there)",
        )
    return passed(name, found)


def _free_memory() -> int:
    """Bytes of memory that Ray takes for free on this machine."""
    memory = psutil.virtual_memory()
    return max(min(total_memory(), memory.total) - memory.used, 0)


def memory(config: RunConfig | None, clustered: bool, limit: int | None = None) -> Finding:
    """Whether Ray sees the limit of this process's memory, and whether workers have room.

    Args:
        config: of the run to train here.
        clustered: whether its workers are on a cluster.
        limit: bytes that this process may use; by default what its control group says.
    """
    name, whole = "memory", total_memory()
    limit = memory_limit() if limit is None else limit
    if limit is not None and limit < whole:
        return failed(
            name,
            f"this process may use {size(limit)}, but Ray takes the machine to have {size(whole)}, and the kernel "
            "would kill it",
            f"start Ray with --memory={int(0.6 * limit)} --object-store-memory={int(0.2 * limit)}",
        )
    free = min(_free_memory(), psutil.virtual_memory().available)
    workers = 0 if clustered else config.train.least_workers if config else 1
    wanted = _RAY + workers * _WORKER
    found = f"{size(free)} of {size(whole)} free"
    if free < wanted:
        return failed(
            name,
            f"{found}, but Ray and {workers} workers take {size(wanted)} before any data",
            "end other programs, or lower 'train.workers'",
        )
    return passed(name, found)


def open_files() -> Finding:
    """Whether Ray's processes may open enough files and connections. Ray raises the soft limit to the hard one."""
    name, (_, hard) = "open files", resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < _OPEN_FILES:
        return failed(
            name,
            f"at most {hard:,} per process, and Ray needs {_OPEN_FILES:,}",
            f"raise the hard limit (ulimit -Hn {_OPEN_FILES}, LimitNOFILE of the service, or docker run --ulimit "
            f"nofile={_OPEN_FILES})",
        )
    return passed(name, "no limit" if hard == resource.RLIM_INFINITY else f"at most {hard:,} per process")


def threads(
    config: RunConfig | None, clustered: bool, environment: Mapping[str, str], here: float | None = None
) -> Finding:
    """Whether the threads of workers have a core each. More threads than cores are several times slower.

    Args:
        config: of the run.
        clustered: whether its workers are on a cluster.
        environment: variables of this process.
        here: cores of this machine; by default what this process may use.
    """
    name, here = "threads", cores() if here is None else here
    text = environment.get("OMP_NUM_THREADS")
    if text is not None and not re.fullmatch("[1-9][0-9]{0,4}", text):
        return failed(name, f"OMP_NUM_THREADS is {shown(text)}, not a number", "unset it, or set it to 1")
    if text is not None and int(text) > here:
        return failed(name, f"OMP_NUM_THREADS is {text}, but there are {here:g} cores", "unset it, or set it to 1")
    if config is None:
        return passed(name, f"{here:g} cores, OMP_NUM_THREADS {text or 'is not set'}")
    train = config.train
    if clustered:
        if train.threads > max(train.cpus_per_worker, 1):
            return failed(
                name, f"'train.threads' is {train.threads}, but a worker reserves {train.cpus_per_worker:g} CPU",
                f"set 'train.cpus_per_worker' to {train.threads}, or lower 'train.threads'",
            )  # fmt: skip
        return passed(name, f"{train.threads} per worker, for which {train.cpus_per_worker:g} CPU is reserved")
    workers = max(train.least_workers, 1)
    found = f"workers: {workers}, threads of each: {train.threads}, cores: {here:g}"
    if workers * train.threads > max(here, 1):
        return failed(name, found, "lower 'train.threads' or 'train.workers'")
    return passed(name, found)


def interfaces(clustered: bool, environment: Mapping[str, str], here: Iterable[str] | None = None) -> Finding:
    """Whether workers know the network that connects them.

    Args:
        clustered: whether there are other hosts.
        environment: variables of this process.
        here: names of this machine's interfaces that are up; by default those that there are.
    """
    name, variable = "interfaces", "GLOO_SOCKET_IFNAME"
    up = sorted(_up() if here is None else here)
    listed = ", ".join(up) or "none"
    chosen = [one for one in environment.get(variable, "").split(",") if one]
    unknown = [one for one in chosen if one not in psutil.net_if_addrs() and one not in up]
    if unknown:
        return failed(
            name, f"{variable} names {shown(unknown[0])}, which this machine does not have (up: {listed})",
            f"set {variable} to the interface that connects the hosts",
        )  # fmt: skip
    if chosen:
        return passed(name, f"{variable} is {','.join(chosen)}")
    if len(up) > 1 and clustered:
        return failed(
            name, f"{len(up)} are up ({listed}), and {variable} is not set",
            f"set {variable} to the interface that connects the hosts",
        )  # fmt: skip
    if len(up) > 1:
        return not_applicable(name, f"{listed} are up, and which of them workers use matters on several hosts only")
    return passed(name, f"{listed} is up")


def _up() -> list[str]:
    """Names of the interfaces that are up and have an address that another host could reach."""
    state = psutil.net_if_stats()
    return [
        name
        for name, addresses in psutil.net_if_addrs().items()
        if name in state and state[name].isup and any(_reachable(address) for address in addresses)
    ]


def _reachable(address: object) -> bool:
    family, text = getattr(address, "family", None), str(getattr(address, "address", ""))
    return (family == socket.AF_INET and not text.startswith("127.")) or (
        family == socket.AF_INET6 and text != "::1" and not text.startswith("fe80")
    )


def ray_disk(environment: Mapping[str, str], folder: str | None = None) -> Finding:
    """Whether Ray can write its logs and the objects that do not fit into memory."""
    name = "Ray's disk"
    folder = folder or environment.get("RAY_TMPDIR") or environment.get("TMPDIR") or "/tmp"
    try:
        usage = shutil.disk_usage(folder)
    except OSError as error:
        return failed(name, f"'{folder}' cannot be used ({error.strerror})", "set RAY_TMPDIR to a folder that exists")
    found = f"{size(usage.free)} of {size(usage.total)} free in '{folder}'"
    if usage.free <= (1 - _FULL) * usage.total:
        return failed(
            name, f"{found}, and Ray writes no objects to a disk that is {_FULL:.0%} full",
            "delete what is not needed there, or set RAY_TMPDIR to a folder on another disk",
        )  # fmt: skip
    return passed(name, found)


def of_every_host(environment: Mapping[str, str]) -> Sequence[Finding]:
    """The checks that say something about any host of a cluster."""
    return [
        packages(), extension_locks(environment), shared_memory(), memory(None, True), open_files(),
        threads(None, True, environment), interfaces(True, environment), ray_disk(environment),
    ]  # fmt: skip
