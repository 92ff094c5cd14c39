"""Checks of this machine, each made to pass and to fail."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import pytest

from distrec.config.run import RunConfig, load_run
from distrec.doctor import host
from distrec.doctor.finding import Finding
from distrec.doctor.limits import cores, memory_limit
from distrec.runtime import FITTING
from tests.training import small

REPOSITORY = Path(__file__).resolve().parents[2]
GIB = 1 << 30


def run_config(tmp_path: Path, **train: Any) -> RunConfig:
    return load_run(small.write_config(tmp_path / "run.yaml", "data", tmp_path, train=train))


def is_failure(found: Finding, told: str, remedy: str) -> None:
    """Check that it failed with these words and this remedy."""
    assert found.state == "failed"
    assert told in found.found
    assert found.remedy is not None
    assert remedy in found.remedy


def test_packages_that_fit_and_others(monkeypatch: pytest.MonkeyPatch) -> None:
    found = host.packages()
    assert found.state == "passed"
    assert f"torch {version('torch')}, torchrec {version('torchrec')}, fbgemm-gpu" in found.found
    monkeypatch.setitem(FITTING, "torch", "1.0")
    is_failure(host.packages(), "do not fit together", "remove .venv and run 'make env'")


def test_the_lock_file_is_compared_with_what_is_installed(tmp_path: Path) -> None:
    assert host.lock_file(tmp_path).state == "not applicable"
    for kind in ("cpu", "gpu"):
        (tmp_path / f"{kind}.txt").write_text(f"# a comment\nnumpy=={version('numpy')}\ntorch==2.13.0\n")
    found = host.lock_file(tmp_path)  # a build of torch, such as 2.13.0+cpu, is that version
    assert (found.state, found.found[:20]) == ("passed", "all 2 packages are t")
    for kind in ("cpu", "gpu"):
        (tmp_path / f"{kind}.txt").write_text(f"numpy=={version('numpy')}\nray==1.0\nno-such-package==3\n")
    is_failure(
        host.lock_file(tmp_path), f"2 of 3 packages differ from locks/{host_kind()}.txt: ray {version('ray')} in place "
        "of 1.0, no-such-package missing in place of 3", f"make env LOCK={host_kind()}",
    )  # fmt: skip


def host_kind() -> str:
    """The lock that this environment was installed from."""
    from importlib.metadata import packages_distributions

    return "gpu" if "fbgemm-gpu" in packages_distributions().get("fbgemm_gpu", []) else "cpu"


def test_a_lock_of_a_build_that_died_is_found(tmp_path: Path) -> None:
    for environment in (
        {"TORCH_EXTENSIONS_DIR": str(tmp_path / "torch_extensions")},
        {"XDG_CACHE_HOME": str(tmp_path)},
    ):
        assert host.extension_locks(environment).state == "passed"
    lock = tmp_path / "torch_extensions/py311_cpu/deepspeed_shm_comm/lock"
    lock.parent.mkdir(parents=True)
    assert host.extension_locks({"XDG_CACHE_HOME": str(tmp_path)}).state == "passed"
    # As torch's FileBaton holds it while it compiles.
    builder = subprocess.Popen(
        [sys.executable, "-c", "import os, sys; os.open(sys.argv[1], os.O_CREAT | os.O_EXCL); print(flush=True); "
         "sys.stdin.read()", str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert builder.stdout is not None
        builder.stdout.readline()
        found = host.extension_locks({"XDG_CACHE_HOME": str(tmp_path)})
        assert (found.state, found.found) == ("passed", "1 build under way")
    finally:
        builder.kill()
        builder.wait(10)
    is_failure(host.extension_locks({"XDG_CACHE_HOME": str(tmp_path)}), f"'{lock}'", "delete it, unless another host")


def test_shared_memory_is_compared_with_what_ray_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    is_failure(host.shared_memory("/proc"), "0 bytes free in /proc, but Ray's objects get", "--shm-size=")
    monkeypatch.setattr(host, "total_memory", lambda: psutil.virtual_memory().used + 1024)  # Ray takes next to none
    assert host.shared_memory(str(tmp_path)).state == "passed"


def test_memory_is_compared_with_workers_and_with_what_ray_sees(tmp_path: Path) -> None:
    assert host.memory(None, False, limit=1 << 60).state == "passed"
    is_failure(
        host.memory(None, False, limit=2 * GIB), "this process may use 2.0 GiB, but Ray takes the machine to have",
        f"--memory={int(1.2 * GIB)} --object-store-memory={int(0.4 * GIB)}",
    )  # fmt: skip
    many = run_config(tmp_path, workers=4096)
    is_failure(
        host.memory(many, False, limit=1 << 60), "4096 workers take 2401.0 GiB before any data", "lower 'train.workers'"
    )
    assert host.memory(many, True, limit=1 << 60).state == "passed"  # they are elsewhere


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.mark.parametrize(
    ("membership", "files", "bytes_", "cpus"),
    [
        ("0::/\n", {}, None, None),
        ("0::/\n", {"memory.max": "max\n", "cpu.max": "max 100000\n"}, None, None),
        ("0::/\n", {"memory.max": "1073741824\n", "cpu.max": "50000 100000\n"}, GIB, 0.5),
        (
            "0::/a.slice/b\n",
            {"memory.max": "max\n", "a.slice/memory.max": "5000\n", "a.slice/b/memory.max": "max\n",
             "a.slice/b/cpu.max": "20000 100000"}, 5000, 0.2,
        ),
        (
            "5:cpu,cpuacct:/job\n4:memory:/job/7\n0::/\n",
            {"memory/memory.limit_in_bytes": "9223372036854771712\n", "memory/job/7/memory.limit_in_bytes": "7000\n",
             "cpu/job/cpu.cfs_quota_us": "25000\n", "cpu/job/cpu.cfs_period_us": "100000\n",
             "cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 7000, 0.25,
        ),
        ("0::/as/seen/outside\n", {"memory.max": "6000\n"}, 6000, None),
    ],
)  # fmt: skip
def test_limits_of_control_groups(
    tmp_path: Path, membership: str, files: dict[str, str], bytes_: int | None, cpus: float | None
) -> None:
    write(tmp_path, {"member": membership, **{f"mount/{name}": text for name, text in files.items()}})
    assert memory_limit(tmp_path / "mount", tmp_path / "member") == bytes_
    wanted = cpus if cpus is not None else len(os.sched_getaffinity(0))
    assert cores(tmp_path / "mount", tmp_path / "member") == wanted


def test_threads_have_cores(tmp_path: Path) -> None:
    two = run_config(tmp_path, workers=2, threads=2, cpus_per_worker=2)
    assert host.threads(two, False, {}, here=4).state == "passed"
    is_failure(host.threads(two, False, {}, here=3), "workers: 2, threads of each: 2, cores: 3", "lower 'train.thr")
    assert host.threads(two, True, {}, here=1).state == "passed"  # the workers are elsewhere
    greedy = run_config(tmp_path, workers=2, threads=3, cpus_per_worker=2)
    is_failure(
        host.threads(greedy, True, {}, here=9), "is 3, but a worker reserves 2 CPU", "'train.cpus_per_worker' to 3"
    )
    assert host.threads(None, False, {"OMP_NUM_THREADS": "4"}, here=4).state == "passed"
    is_failure(host.threads(None, False, {"OMP_NUM_THREADS": "5"}, here=4), "is 5, but there are 4 cores", "unset it")
    is_failure(host.threads(None, False, {"OMP_NUM_THREADS": "all"}, here=4), "is 'all', not a number", "unset it")


def in_child(code: str, files: int) -> str:
    """What a new Python prints that may open `files` files."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True, cwd=REPOSITORY,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (files, files)),
    )  # fmt: skip
    return done.stdout


def test_the_limit_of_open_files() -> None:
    code = "from distrec.doctor.host import open_files; found = open_files(); print(found.state, found.found)"
    assert in_child(code, 1024) == "failed at most 1,024 per process, and Ray needs 8,192\n"
    assert in_child(code, 8192) == "passed at most 8,192 per process\n"


@pytest.mark.parametrize(
    ("clustered", "chosen", "up", "state", "told"),
    [
        (True, None, ["eth0"], "passed", "eth0 is up"),
        (True, None, [], "passed", "none is up"),
        (True, None, ["eth0", "docker0"], "failed", "2 are up (docker0, eth0), and GLOO_SOCKET_IFNAME is not set"),
        (False, None, ["eth0", "docker0"], "not applicable", "several hosts only"),
        (True, "eth0", ["eth0", "docker0"], "passed", "GLOO_SOCKET_IFNAME is eth0"),
        (True, "eth0,lo", ["eth0"], "passed", "GLOO_SOCKET_IFNAME is eth0,lo"),
        (False, "eth9", ["eth0"], "failed", "GLOO_SOCKET_IFNAME names 'eth9', which this machine does not have"),
    ],
)
def test_interfaces(clustered: bool, chosen: str | None, up: list[str], state: str, told: str) -> None:
    environment = {} if chosen is None else {"GLOO_SOCKET_IFNAME": chosen}
    found = host.interfaces(clustered, environment, up)
    assert found.state == state
    assert told in found.found
    assert (found.remedy is not None) == (state == "failed")


def test_interfaces_of_this_machine() -> None:
    assert host.interfaces(False, {}).state != "failed"
    assert host.interfaces(True, {"GLOO_SOCKET_IFNAME": "lo"}).state == "passed"
    assert host.interfaces(True, {"GLOO_SOCKET_IFNAME": "nosuch0"}).state == "failed"


def test_the_disk_of_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    is_failure(host.ray_disk({"RAY_TMPDIR": "/proc"}), "0 bytes of 0 bytes free in '/proc'", "a folder on another disk")
    is_failure(host.ray_disk({"RAY_TMPDIR": str(tmp_path / "absent")}), "cannot be used", "set RAY_TMPDIR")
    monkeypatch.setattr(host, "_FULL", 1.1)
    assert host.ray_disk({"TMPDIR": str(tmp_path)}).state == "passed"


@pytest.mark.parametrize("check", [host.packages, host.open_files, host.shared_memory, host.lock_file])
def test_a_failure_has_a_remedy_and_nothing_else_has(check: Callable[[], Finding]) -> None:
    found = check()
    assert (found.remedy is not None) == (found.state == "failed")
    assert "\n" not in found.found
