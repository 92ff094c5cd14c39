"""A full disk is one sentence on every rank, leaves nothing of the torn checkpoint, and deletes no other."""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from distrec.data.dataset import Dataset
from distrec.data.storage import open_folder
from distrec.errors import InputError, StorageError, StorageFull
from distrec.methods.registry import METHODS, build_method
from distrec.parallel.world import World
from distrec.training import checkpoint, disk, size
from distrec.training.alike import alike
from distrec.training.checkpoint import Checkpoints
from distrec.training.engine import Engine
from distrec.training.size import check_disk, checkpoint_bytes
from tests.distributed import run_workers
from tests.methods import bare, beside
from tests.training import small

VALUES = 75_000  # 300 KB


def on_a_small_disk(path: str) -> list[str]:
    """Fill a disk of 1 MB, which only this process sees, with checkpoints; returns the messages."""
    assert ctypes.CDLL(None).unshare(0x00020000) == 0  # CLONE_NEWNS
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", path], check=True)
    checkpoints, messages = Checkpoints(open_folder(f"{path}/checkpoints"), World.current()), []
    for number in range(3):
        checkpoints.save(f"epoch-{number:06d}-step-000000000", {"x": torch.rand(VALUES)}, {})
    whole = checkpoints.names()
    for check in (disk.require_room, lambda folder, needed: None):  # at the beginning, and in the middle
        checkpoint.require_room = check
        with pytest.raises(StorageFull) as raised:
            checkpoints.save("epoch-000003-step-000000000", {"x": torch.rand(VALUES)}, {})
        messages.append(str(raised.value))
        assert checkpoints.names() == whole
        assert all(checkpoints.defect(name) is None for name in whole)
        assert os.statvfs(path).f_bavail * os.statvfs(path).f_bsize > 90_000  # the torn one takes nothing
    checkpoints.keep_only({whole[-1]})
    checkpoints.save("epoch-000003-step-000000000", {"x": torch.rand(VALUES)}, {})
    return messages


@pytest.mark.multiprocess
@pytest.mark.skipif(os.geteuid() != 0, reason="a small disk in a mount namespace needs root")
def test_a_disk_that_becomes_full(tmp_path: Path) -> None:
    (messages,) = run_workers(on_a_small_disk, 1, str(tmp_path))
    for message in messages:
        assert f"'{tmp_path}/checkpoints/epoch-000003-step-000000000' needs 300,002 bytes" in message
        assert " bytes free" in message


def together(world: World, error: Exception | None) -> None:
    with alike(world):
        if error is not None:
            raise error


def full_for_one(path: str) -> str:
    """The last rank sees a full disk, and then one that becomes full; returns the last message."""
    world = World.current()
    last = world.rank == world.size - 1
    checkpoints = Checkpoints(open_folder(path), world)
    tensors = {f"x{number}": torch.rand(10) for number in range(world.size)}
    checkpoints.save("epoch-000000-step-000000000", tensors, {})
    free, write = disk.free_bytes, checkpoint.write_tensors

    def broken(*arguments: object) -> tuple[int, bytes]:
        write(*arguments)
        raise StorageFull("of one file")

    for patch in ({"free": lambda folder: 7, "write": write}, {"free": free, "write": broken}):
        if last:
            disk.free_bytes, checkpoint.write_tensors = patch["free"], patch["write"]
        with pytest.raises(StorageFull, match=rf"' needs {40 * world.size + 2} bytes, but its disk is full \(") as full:
            checkpoints.save("epoch-000001-step-000000000", tensors, {})
        world.barrier()
        assert checkpoints.names() == ["epoch-000000-step-000000000"]
        world.barrier()
    disk.free_bytes, checkpoint.write_tensors = free, write
    for error, kind, message in (
        (StorageError("no answer"), StorageError, "no answer"),
        (OSError(5, "Input/output error"), OSError, "[Errno 5] Input/output error"),
        (KeyError("x"), KeyError if last else RuntimeError, "'x'"),
        (InputError("ü" * 5000), InputError, "ü" * 5000 if last else "ü" * ((4096 - len("InputError\0")) // 2)),
    ):
        with pytest.raises(kind) as raised:
            together(world, error if last else None)
        assert (type(raised.value), str(raised.value)) == (kind, message)
    with pytest.raises(StorageError, match=r"^0$"):  # of several, the first one's
        together(world, (InputError if world.rank else StorageError)(str(world.rank)))
    together(world, None)
    return str(full.value)


@pytest.mark.multiprocess
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_every_worker_raises_the_error_of_one(tmp_path: Path, workers: int) -> None:
    messages = run_workers(full_for_one, workers, str(tmp_path / "checkpoints"))
    assert len(set(messages)) == 1


# --- the estimate -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small.write_small(tmp_path_factory.mktemp("data"))


def sizes(data: str) -> dict[tuple[str, str], tuple[int, int]]:
    """Of every method: the estimated bytes of a checkpoint, and those of its tensors without the kept ones."""
    opened, out = Dataset.open(data), {}
    for name, optimizer in (
        *((name, rule) for name, kind in METHODS.items() if kind.trainable for rule in ("adam", "sgd")),
        ("bprmf", "sparse"),
    ):
        section = {"tables": "sparse"} if optimizer == "sparse" else {"name": optimizer}
        config = bare.run_config(beside.settings(name), data=data, optimizer=section)
        engine = Engine(World.current(), opened, config)
        tensors = {key: value for key, value in engine.state().items() if not key.startswith("kept.")}
        taken = sum(value.numel() * value.element_size() for value in tensors.values()) + engine.samples_per_epoch
        out[name, optimizer] = checkpoint_bytes(config, opened, engine.method, engine.samples_per_epoch), taken
    return out


@pytest.mark.multiprocess
def test_the_bytes_of_a_checkpoint_are_those_of_its_tensors(data: str) -> None:
    (found,) = run_workers(sizes, 1, data)
    assert {case: estimate for case, (estimate, _) in found.items()} == {
        case: taken for case, (_, taken) in found.items()
    }
    assert len(set(found.values())) > len(METHODS)


def test_a_run_whose_checkpoints_do_not_fit_is_refused(
    tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = bare.run_config({"name": "bprmf", "dim": 8}, data=data, run={"name": "run", "storage": str(tmp_path)})
    opened = Dataset.open(data)
    method = build_method(config, opened)
    needed, old = 4 * checkpoint_bytes(config, opened, method, 9), tmp_path / "run/checkpoints/c/rows.safetensors"
    monkeypatch.setattr(size, "free_bytes", lambda folder: needed - 100)
    with pytest.raises(InputError, match=rf"needs at least {needed:,} bytes .* {needed - 100:,} bytes free; free"):
        check_disk(config, opened, method, 9)
    old.parent.mkdir(parents=True)
    old.write_bytes(bytes(99))
    with pytest.raises(InputError, match="free and 99 in the run's checkpoints; free the rest"):
        check_disk(config, opened, method, 9)
    old.write_bytes(bytes(100))
    check_disk(config, opened, method, 9)


def test_what_is_free_where_a_folder_will_be(tmp_path: Path) -> None:
    free = disk.free_bytes(open_folder(str(tmp_path / "not/there/yet")))
    assert np.isclose(free, disk.free_bytes(open_folder(str(tmp_path))), rtol=0.1)
