"""Checkpoints: everything a run needs to go on, at any number of workers, sharding plan and ZeRO stage.

One folder each, written by all ranks through `torch.distributed.checkpoint` (tables and moments by global row, dense
weights and moments by full name), beside `state.json` (cursor, history, keys). `complete.json` comes last and lists
every file with its size: a folder without it, or with a file of another size, is torn and passed over.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter

from distrec.data.storage import Folder
from distrec.errors import InputError
from distrec.parallel.world import World


class Checkpoints:
    """The checkpoints of one run, in `folder`. `save` and `load` are collective."""

    def __init__(self, folder: Folder, world: World):
        self.folder, self.world = folder, world

    def save(self, name: str, tensors: dict[str, Any], state: dict[str, Any]) -> None:
        """Write checkpoint `name`; when it returns on any rank, the checkpoint is complete."""
        inside = self.folder.folder(name)
        if self.world.rank == 0:
            inside.remove()  # a torn one of the same name
            inside.make()
        self.world.barrier()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # DCP speaks of torch's own renamings
            dcp.save(tensors, storage_writer=_writer(inside))
        if self.world.rank == 0:
            inside.write_json(state, "state.json")
            inside.write_json(_sizes(inside), "complete.json")
        self.world.barrier()

    def load(self, name: str, tensors: dict[str, Any]) -> None:
        """Fill `tensors` (as `save` took them, at this world size) from checkpoint `name`."""
        require_complete(self.folder.folder(name))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.load(tensors, storage_reader=_reader(self.folder.folder(name)))

    def state(self, name: str) -> dict[str, Any]:
        """`state.json` of checkpoint `name`."""
        state: dict[str, Any] = self.folder.read_json(name, "state.json")
        return state

    def latest(self) -> str | None:
        """The newest complete checkpoint; torn ones are passed over."""
        return next((name for name in reversed(self.folder.names()) if is_complete(self.folder.folder(name))), None)

    def keep_only(self, names: set[str]) -> None:
        """Delete every other checkpoint."""
        if self.world.rank == 0:
            for name in self.folder.names():
                if name not in names:
                    self.folder.remove(name)


def is_complete(folder: Folder) -> bool:
    """Whether every file that `complete.json` lists is there with its size."""
    try:
        listed = folder.read_json("complete.json")
    except (OSError, ValueError):
        return False
    return bool(listed) and listed.items() <= _sizes(folder).items()


def require_complete(folder: Folder) -> None:
    """Refuse a checkpoint that has been damaged or deleted.

    Raises:
        InputError: it has.
    """
    if not is_complete(folder):
        raise InputError(
            f"checkpoint '{folder}' is torn or missing; restore it, or train again under another 'run.name'."
        )


def _sizes(folder: Folder) -> dict[str, int]:
    folder.fs.invalidate_cache()
    return {
        entry["name"].rstrip("/").rpartition("/")[2]: int(entry["size"])
        for entry in folder.fs.ls(folder.path, detail=True)
        if entry["type"] == "file" and not entry["name"].endswith("complete.json")
    }


def _writer(folder: Folder) -> Any:
    if folder.local:
        return FileSystemWriter(folder.path, single_file_per_rank=True)
    from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter

    return FsspecWriter(str(folder), single_file_per_rank=True)


def _reader(folder: Folder) -> Any:
    if folder.local:
        return FileSystemReader(folder.path)
    from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader

    return FsspecReader(str(folder))
