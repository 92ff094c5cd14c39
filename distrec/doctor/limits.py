"""The limits of the control group (container, service, batch job) in which this process runs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

MOUNT, MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def memory_limit(mount: Path = MOUNT, membership: Path = MEMBERSHIP) -> int | None:
    """Bytes of memory that this process's groups may use; None: as much as there is."""
    found = []
    for folder in _folders("memory", mount, membership):
        for file in ("memory.max", "memory.limit_in_bytes"):
            with suppress(OSError, ValueError):  # no such file, or "max"
                found.append(int((folder / file).read_text(encoding="ascii")))
    return min(found, default=None)


def cores(mount: Path = MOUNT, membership: Path = MEMBERSHIP) -> float:
    """CPUs that this process may use at a time."""
    found = [float(len(os.sched_getaffinity(0)))]
    for folder in _folders("cpu", mount, membership):
        with suppress(OSError, ValueError):  # no such file, or "max 100000"
            quota, period = (folder / "cpu.max").read_text(encoding="ascii").split()
            found.append(int(quota) / int(period))
        with suppress(OSError, ValueError):
            quota = (folder / "cpu.cfs_quota_us").read_text(encoding="ascii")
            if int(quota) > 0:  # -1: no limit
                found.append(int(quota) / int((folder / "cpu.cfs_period_us").read_text(encoding="ascii")))
    return min(found)


def _folders(controller: str, mount: Path, membership: Path) -> Iterator[Path]:
    """The folders of this process's groups for a controller, of version 2 and 1, up to the outermost that is visible.

    A container sees its own group as the outermost one, where its path in `membership` may not exist.
    """
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    yield from (mount, mount / controller)
    for line in lines:
        _, controllers, path = line.split(":", 2)
        root = mount if not controllers else mount / controller if controller in controllers.split(",") else None
        inner = root / path.lstrip("/") if root is not None else None
        while inner is not None and inner != root:
            yield inner
            inner = inner.parent
