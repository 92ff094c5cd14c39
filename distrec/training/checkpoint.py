"""Checkpoints: everything a run needs to continue, at any number of workers, sharding plan and ZeRO stage.

A checkpoint is a folder (docs/data.md section 5). Its tensors are safetensors files and all other content is JSON, so
that reading one never runs code. Each rank writes its own rows of tables and their moments, with the number of the
first row, to `rows-<rank>.safetensors`, and its share of the dense weights, moments and counts to
`whole-<rank>.safetensors`.
`state.json` holds the cursor, the history and the dataset's hash. `complete.json` is written last and lists every other
file with its size and SHA-256. A checkpoint that does not match it is damaged.

PyTorch's own distributed checkpoint is not used: it stores its metadata as a pickle, which can run code when read.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from distrec.data.storage import Folder
from distrec.errors import InputError
from distrec.parallel.partition import Partition
from distrec.parallel.world import World
from distrec.training.run_folder import is_checkpoint
from distrec.training.tensor_file import read_rows, stored_tensors, write_tensors

FORMAT = 1
_DIGEST = hashlib.sha256().digest_size
_REMEDY = "restore it, or train again under another 'run.name'"


class Checkpoints:
    """The checkpoints of one run, in `folder`. `save`, `load`, `defect` and `newest_intact` are collective."""

    def __init__(self, folder: Folder, world: World):
        self.folder, self.world = folder, world

    def save(self, name: str, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
        """Write checkpoint `name`. When this returns on any rank, the checkpoint is complete.

        Args:
            tensors: by name, tensors sharded by global row (`DTensor`), and others that are equal on every rank.
            state: the content of `state.json`.
        """
        inside = self.folder.folder(name)
        if self.world.rank == 0:
            inside.remove()  # an incomplete checkpoint may have the same name
            inside.make()
        self.world.barrier()
        rows = {key: value for key, value in tensors.items() if isinstance(value, DTensor)}
        parts = {
            "rows": {key: value.to_local() for key, value in rows.items()},
            "whole": {key: tensors[key] for key in _share_of(self.world, tensors.keys() - rows.keys(), tensors)},
        }
        first_rows = {key: self._partition(value).start(self.world.rank) for key, value in rows.items()}
        facts = torch.zeros(len(parts), 8 + _DIGEST, dtype=torch.uint8)
        for number, (kind, held) in enumerate(parts.items()):
            if held:
                starts = {key: first_rows[key] for key in held.keys() & first_rows.keys()}
                size, digest = write_tensors(inside, _file(kind, self.world.rank), held, starts)
                facts[number] = torch.frombuffer(bytearray(size.to_bytes(8, "little") + digest), dtype=torch.uint8)
        every = self.world.gather_rows(facts, [len(parts)] * self.world.size).numpy()
        if self.world.rank == 0:
            names = [_file(kind, rank) for rank in range(self.world.size) for kind in parts]
            files = {
                file: {"bytes": int.from_bytes(fact[:8].tobytes(), "little"), "sha256": fact[8:].tobytes().hex()}
                for file, fact in zip(names, every, strict=True)
                if fact.any()
            }
            inside.write_json(state, "state.json")
            files["state.json"] = {
                "bytes": len(inside.read_bytes("state.json")),
                "sha256": inside.sha256("state.json"),
            }
            inside.write_json({"format": FORMAT, "files": files}, "complete.json")
        self.world.barrier()

    def load(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        """Fill `tensors` from checkpoint `name`. They have the names and global shapes that `save` was given.

        Raises:
            InputError: on every rank, if the checkpoint is missing or damaged, or belongs to another model.
        """
        inside = self.folder.folder(name)
        require_readable(inside)
        if defect := self.defect(name):
            raise InputError(f"checkpoint '{inside}' is damaged ({defect}); {_REMEDY}.")
        problem: str | None = None
        try:
            self._read(inside, tensors)
        except ValueError as error:
            problem = str(error)
        if self.world.max_(torch.tensor(int(problem is not None))):
            raise InputError(
                f"checkpoint '{inside}' belongs to another model or version ({problem or 'seen by another worker'}); "
                f"{_REMEDY}."
            )

    def _read(self, inside: Folder, tensors: dict[str, torch.Tensor]) -> None:
        left = {key: self._mine(value) for key, value in tensors.items()}
        for file in sorted(listed_files(inside) or {}):
            if not file.endswith(".safetensors"):
                continue
            for key, stored in stored_tensors(inside, file).items():
                if key not in tensors:
                    raise ValueError(f"'{file}' holds '{key}', which this model does not have")
                value = tensors[key]
                local = value.to_local() if isinstance(value, DTensor) else value
                if stored.dtype != local.dtype or stored.shape[1:] != tuple(local.shape[1:]):
                    raise ValueError(f"'{key}' is {list(stored.shape)} {stored.dtype} in '{file}'")
                first, stop = self._rows(value)
                count = stored.shape[0] if stored.shape else 1
                low, high = max(first, stored.first_row), min(stop, stored.first_row + count)
                if low < high:
                    into = local[low - first : high - first] if local.dim() else local
                    read_rows(inside, file, stored, low - stored.first_row, into)
                    left[key] -= high - low
        missing = [key for key, rows in left.items() if rows]
        if missing:
            raise ValueError(f"it lacks rows of '{missing[0]}'")

    def defect(self, name: str) -> str | None:
        """Compare every file of checkpoint `name` with its SHA-256; ranks share the work. Collective.

        Returns:
            A phrase that names a bad file, the same on every rank, or None.
        """
        inside = self.folder.folder(name)
        listed = listed_files(inside) or {}
        names = ["complete.json", *sorted(listed)]
        bad = 0 if listed else 1  # 1 + the index of a bad file
        for number in range(1 + self.world.rank, len(names), self.world.size):
            if not _is_intact(inside, names[number], listed[names[number]]):
                bad = 1 + number
        worst = int(self.world.max_(torch.tensor(bad)))
        if not worst:
            return None
        file = names[worst - 1] if worst <= len(names) else "a file"
        if not inside.exists(file):
            return f"'{file}' is missing"
        return f"'{file}' differs from what was written"

    def newest_intact(self) -> tuple[str | None, dict[str, str]]:
        """The newest checkpoint whose files all match their SHA-256, or None. Collective.

        Returns:
            Its name, and the defects of newer checkpoints by name.

        Raises:
            InputError: a checkpoint has a format that is not read.
        """
        defects: dict[str, str] = {}
        for name in reversed(self.names()):
            require_readable(self.folder.folder(name))
            defect = self.defect(name)
            if defect is None:
                return name, defects
            defects[name] = defect
        return None, defects

    def names(self) -> list[str]:
        """The names of all checkpoints, complete or not, oldest first. Other names in the folder are not ours."""
        return [name for name in self.folder.names() if is_checkpoint(name)]

    def state(self, name: str) -> dict[str, Any]:
        """The content of `state.json` in checkpoint `name`."""
        state: dict[str, Any] = self.folder.read_json(name, "state.json")
        return state

    def latest(self) -> str | None:
        """The name of the newest checkpoint with all its files, or None; their content is not read."""
        return next((name for name in reversed(self.names()) if is_complete(self.folder.folder(name))), None)

    def keep_only(self, names: set[str]) -> None:
        """Delete all checkpoints except `names`."""
        if self.world.rank == 0:
            for name in self.names():
                if name not in names:
                    self.folder.remove(name)

    def _partition(self, value: DTensor) -> Partition:
        return Partition(value.shape[0], self.world.size)

    def _rows(self, value: torch.Tensor) -> tuple[int, int]:
        """The first row that I hold of `value`, and the row after my last one; a scalar has one row."""
        if isinstance(value, DTensor):
            partition = self._partition(value)
            return partition.start(self.world.rank), partition.stop(self.world.rank)
        return 0, value.shape[0] if value.dim() else 1

    def _mine(self, value: torch.Tensor) -> int:
        first, stop = self._rows(value)
        return stop - first


def listed_files(folder: Folder) -> dict[str, dict[str, Any]] | None:
    """The files in `complete.json` with their `bytes` and `sha256`; None if it is missing or damaged."""
    try:
        listed = folder.read_json("complete.json")
        files = dict(listed["files"]) if listed["format"] == FORMAT and len(listed) == 2 else {}
        sound = all(
            entry.keys() == {"bytes", "sha256"} and isinstance(entry["bytes"], int) and isinstance(entry["sha256"], str)
            for entry in files.values()
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    return files if files and sound and all("/" not in name for name in files) else None


def is_complete(folder: Folder) -> bool:
    """Whether every file that `complete.json` lists exists with the listed size."""
    listed = listed_files(folder)
    if listed is None:
        return False
    folder.fs.invalidate_cache()
    there = {
        entry["name"].rstrip("/").rpartition("/")[2]: int(entry["size"])
        for entry in folder.fs.ls(folder.path, detail=True)
        if entry["type"] == "file"
    }
    return all(there.get(name) == entry["bytes"] for name, entry in listed.items())


def require_complete(folder: Folder) -> None:
    """Check that a checkpoint has all its files, without reading them.

    Raises:
        InputError: a file is missing or has another size, or the format is not read.
    """
    require_readable(folder)
    if not is_complete(folder):
        raise InputError(f"checkpoint '{folder}' is torn or missing; {_REMEDY}.")


def require_readable(folder: Folder) -> None:
    """Refuse a checkpoint whose metadata is a pickle, which could run code when read.

    Raises:
        InputError: it is one.
    """
    if folder.exists(".metadata"):
        raise InputError(
            f"checkpoint '{folder}' is in an older format with pickled metadata, which is never read; train again "
            "under another 'run.name'."
        )


def _is_intact(folder: Folder, name: str, entry: dict[str, Any]) -> bool:
    try:
        return folder.fs.size(folder.at(name)) == entry["bytes"] and folder.sha256(name) == entry["sha256"]
    except (OSError, InputError):
        return False


def _file(kind: str, rank: int) -> str:
    return f"{kind}-{rank:05d}.safetensors"


def _share_of(world: World, names: set[str], tensors: dict[str, torch.Tensor]) -> list[str]:
    """My share of `names`, such that ranks write about the same number of bytes; the largest tensors come first."""
    loads, mine = [0] * world.size, []
    size = {name: tensors[name].numel() * tensors[name].element_size() for name in names}
    for name in sorted(names, key=lambda name: (-size[name], name)):
        rank = loads.index(min(loads))
        loads[rank] += size[name]
        if rank == world.rank:
            mine.append(name)
    return mine
