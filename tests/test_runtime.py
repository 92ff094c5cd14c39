"""Process setup: version check, log noise, memory allocation, and the DeepSpeed op that must not be compiled."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from distrec import runtime
from distrec.errors import InputError


def python(code: str, *, path: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a new interpreter that searches `path` first for imports."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | env
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=180, check=False
    )


def pretend(folder: Path, **packages: str) -> Path:
    """Write metadata into `folder` as if `packages` were installed; it shadows that of the real ones.

    Package names have underscores for hyphens.
    """
    for package, version in packages.items():
        info = folder / f"{package}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    return folder


CHECK = "from distrec.runtime import check_stack; check_stack(); import sys; assert 'torch' not in sys.modules"


def test_installed_stack_fits_and_is_checked_without_importing_torch() -> None:
    result = python(CHECK)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "packages",
    [
        {"torch": "2.14.0"},
        {"torch": "2.1.3"},
        {"torch": "2.130.0"},
        {"torchrec": "1.9.0"},
        {"fbgemm_gpu": "1.8.0", "fbgemm_gpu_cpu": "1.8.0"},
        {"fbgemm_gpu_cpu": "1.9.0", "fbgemm_gpu": "1.9.0"},
        {"torch": "2.12.1+cu130", "torchrec": "1.7.0"},
    ],
)
def test_packages_that_do_not_fit_are_refused_with_versions_and_remedy(
    tmp_path: Path, packages: dict[str, str]
) -> None:
    result = python(CHECK, path=pretend(tmp_path, **packages))
    assert result.returncode == 1
    message = result.stderr.strip().splitlines()[-1]
    assert message.startswith("distrec.errors.InputError")
    for package, version in packages.items():
        assert f"{package.replace('_', '-')} {version}" in message
    assert all(wanted in message for wanted in ("torch 2.13.*", "torchrec 1.8.*", "1.8.*;", "make env"))


def test_local_build_of_the_fitting_torch_is_accepted(tmp_path: Path) -> None:
    result = python(CHECK, path=pretend(tmp_path, torch="2.13.0+cu130"))
    assert result.returncode == 0, result.stderr


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(runtime.FITTING, "no-such-package", "1.0")
    monkeypatch.setattr(sys, "path", [])  # no metadata is found, as if nothing were installed
    with pytest.raises(InputError, match="torch missing, torchrec missing"):
        runtime.check_stack()


def test_versions_list_installed_packages() -> None:
    found = runtime.versions()
    assert found["torch"].startswith("2.13.")
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"torchrec", "deepspeed", "ray", "distrec"} <= set(found)
    assert len({"fbgemm-gpu", "fbgemm-gpu-cpu"} & set(found)) == 1


NOISE = """
import logging
from distrec.runtime import quiet
QUIET
import torchrec, deepspeed, ray.train
logging.getLogger().setLevel(logging.INFO)
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice, SplitTableBatchedEmbeddingBagsCodegen)
SplitTableBatchedEmbeddingBagsCodegen(
    [(8, 8, EmbeddingLocation.HOST, ComputeDevice.CPU)], optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD)
logging.getLogger("ray.train").info("ray train noise")
logging.warning("kept warning")
"""


def test_quiet_removes_library_noise_and_keeps_warnings() -> None:
    loud = python(NOISE.replace("QUIET", ""))
    calm = python(NOISE.replace("QUIET", "quiet(); quiet()"))
    assert loud.returncode == calm.returncode == 0, calm.stderr
    for noise in ("TBE=", "Setting accelerator to CPU", "ray train noise"):
        assert noise in loud.stdout + loud.stderr
        assert noise not in calm.stdout + calm.stderr
    assert "kept warning" in calm.stderr


FAULTS = """
import resource, torch
from distrec.runtime import tune_process
TUNE
x = torch.ones(26_495, 448)
def step():
    return [x + x for _ in range(2)]
step(); step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, torch.get_num_threads())
"""


def test_tuned_process_reuses_the_memory_of_large_outputs() -> None:
    # The new processes inherit this process's environment, which an earlier test may have changed.
    untouched = {"THP_MEM_ALLOC_ENABLE": "0"}
    fresh, _ = map(int, python(FAULTS.replace("TUNE", ""), **untouched).stdout.split())
    kept, threads = map(int, python(FAULTS.replace("TUNE", "tune_process(2)"), **untouched).stdout.split())
    assert threads == 2
    assert fresh > 50_000  # 10 outputs of 47 MB in pages of 4 KiB
    assert kept < fresh / 10


SHM = """
import deepspeed, torch.distributed
from distrec.training.deepspeed_internals import disable_shm_comm
torch.distributed.init_process_group("gloo")
disable_shm_comm()
deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
torch.distributed.destroy_process_group()
"""


def test_deepspeed_starts_without_compiling_despite_a_stale_lock(tmp_path: Path) -> None:
    # A killed compilation leaves this file behind, and a start that compiles would wait for it.
    lock = tmp_path / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir()
    lock.touch()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    result = python(SHM, TORCH_EXTENSIONS_DIR=str(tmp_path), **place)
    assert result.returncode == 0, result.stderr
    assert [path.name for path in lock.parent.iterdir()] == ["lock"]


RELEASED = """
from distrec.runtime import release_memory, tune_process
tune_process(1)
import torch

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

held = [[torch.ones(1 << 20), torch.ones(1 << 10)] for _ in range(100)]  # 4 MiB, which go, and 4 KiB, which stay
held = [small for large, small in held]
before = resident()
release_memory()
print(before - resident(), sum(int(small.sum()) for small in held))
"""


def test_memory_is_released_between_blocks_in_use() -> None:
    freed, total = map(int, python(RELEASED).stdout.split())
    assert freed > 300 << 20
    assert total == 100 << 10
