"""Checkpoints: everything a run needs to continue, at any number of workers, sharding plan and ZeRO stage.

A checkpoint is a folder. All ranks write its tensors through `torch.distributed.checkpoint` (DCP): tables and their
moments by global row, dense weights and moments by full name. `state.json` holds the cursor, the history and the
dataset's hash. `complete.json` is written last and lists every file with its size. A folder without it, or with a file
that is missing or has another size, is incomplete and is skipped.
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
        """Write checkpoint `name`. When this returns on any rank, the checkpoint is complete."""
        inside = self.folder.folder(name)
        if self.world.rank == 0:
            inside.remove()  # an incomplete checkpoint may have the same name
            inside.make()
        self.world.barrier()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # DCP warns about names that torch itself deprecated
            dcp.save(tensors, storage_writer=_writer(inside))
        if self.world.rank == 0:
            inside.write_json(state, "state.json")
            inside.write_json(_sizes(inside), "complete.json")
        self.world.barrier()

    def load(self, name: str, tensors: dict[str, Any]) -> None:
        """Fill `tensors` from checkpoint `name`. They have the names and global shapes that `save` was given.

        Raises:
            InputError: the checkpoint is incomplete or missing.
        """
        require_complete(self.folder.folder(name))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.load(tensors, storage_reader=_reader(self.folder.folder(name)))

    def state(self, name: str) -> dict[str, Any]:
        """The content of `state.json` in checkpoint `name`."""
        state: dict[str, Any] = self.folder.read_json(name, "state.json")
        return state

    def latest(self) -> str | None:
        """The name of the newest complete checkpoint, or None if there is none."""
        return next((name for name in reversed(self.folder.names()) if is_complete(self.folder.folder(name))), None)

    def keep_only(self, names: set[str]) -> None:
        """Delete all checkpoints except `names`."""
        if self.world.rank == 0:
            for name in self.folder.names():
                if name not in names:
                    self.folder.remove(name)


def is_complete(folder: Folder) -> bool:
    """Whether every file that `complete.json` lists exists with the listed size."""
    try:
        listed = folder.read_json("complete.json")
    except (OSError, ValueError):
        return False
    return bool(listed) and listed.items() <= _sizes(folder).items()


def require_complete(folder: Folder) -> None:
    """Check that a checkpoint is complete.

    Raises:
        InputError: the checkpoint is incomplete or missing.
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
