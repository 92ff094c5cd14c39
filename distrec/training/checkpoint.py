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
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal

import torch
from pydantic import ConfigDict, Field
from torch.distributed.tensor import DTensor

from distrec.data.storage import Folder, sha256
from distrec.errors import InputError, StorageError
from distrec.parallel.partition import Partition
from distrec.parallel.world import World
from distrec.training.alike import alike
from distrec.training.attempts import Record, checked
from distrec.training.disk import StorageFull, filling, require_room
from distrec.training.run_folder import checkpoint_name, checkpoint_place, is_checkpoint
from distrec.training.tensor_file import read_rows, stored_tensors, write_tensors

FORMAT = 1
_COMPLETE, _STATE = "complete.json", "state.json"
_DIGEST = hashlib.sha256().digest_size
_REMEDY = "restore it, or train again under another 'run.name'"


class _File(Record):
    model_config = ConfigDict(extra="forbid", strict=True)

    bytes: int
    sha256: str


class _Complete(Record):
    model_config = ConfigDict(extra="forbid", strict=True)

    format: Literal[1]
    workers: int = Field(ge=1)
    files: Annotated[dict[Annotated[str, Field(pattern="^[a-z0-9.-]+$")], _File], Field(min_length=1)]


@dataclass(frozen=True)
class Mine:
    """What one rank writes of a checkpoint.

    Attributes:
        parts: its tensors by name, by the kind of file; each rank has the same kinds.
        first_rows: the number of the first row of each tensor of which other ranks hold other rows.
    """

    parts: dict[str, dict[str, torch.Tensor]]
    first_rows: dict[str, int]

    def bytes(self) -> int:
        """The size of all tensors in bytes."""
        return sum(value.nbytes for held in self.parts.values() for value in held.values())


class Checkpoints:
    """The checkpoints of one run, in `folder`. `save`, `load`, `defect` and `newest_intact` are collective."""

    def __init__(self, folder: Folder, world: World):
        self.folder, self.world = folder, world
        self._intact: set[str] = set()  # verified here, and not written again since

    @cached_property
    def apart(self) -> World:
        """The world for writing in a thread of its own; see `World.apart`. Collective when it is first read."""
        return self.world.apart()

    def save(self, name: str, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
        """Write checkpoint `name`. When this returns on any rank, the checkpoint is complete.

        Args:
            tensors: by name, tensors sharded by global row (`DTensor`), and others that are equal on every rank.
            state: the content of `state.json`.

        Raises:
            StorageFull: on every rank, if the disk has no room for it; what was written of it is removed.
        """
        self.write(name, self.mine(tensors), state)

    def mine(self, tensors: dict[str, torch.Tensor], copy: bool = False) -> Mine:
        """What this rank writes of `tensors`; with `copy` in memory of its own, so that they may change meanwhile."""
        rows = {key: value for key, value in tensors.items() if isinstance(value, DTensor)}
        whole = _share_of(self.world, tensors.keys() - rows.keys(), tensors)
        parts = {
            "rows": {key: value.to_local().detach().to("cpu", copy=copy) for key, value in rows.items()},
            "whole": {key: tensors[key].to("cpu", copy=copy) for key in whole},
        }
        return Mine(parts, {key: self._partition(value).start(self.world.rank) for key, value in rows.items()})

    def write(
        self,
        name: str,
        mine: Mine,
        state: dict[str, Any],
        require: Callable[[], None] = lambda: None,
        world: World | None = None,
    ) -> int:
        """Write checkpoint `name` from what each rank holds of it. Collective.

        Args:
            require: called on rank 0 before anything is written, and again before the checkpoint is completed. If it
                raises an error, so does this.
            world: for the collectives, in place of the own one.

        Returns:
            The size of all files in bytes.
        """
        world = world or self.world
        inside = self.folder.folder(name)
        self._intact.discard(name)
        with alike(world):
            if world.rank == 0:
                require()
                inside.remove()  # an incomplete checkpoint may have the same name
                inside.make()
        try:
            return self._write(inside, mine, json.dumps(state).encode(), require, world)
        except StorageFull:
            if world.rank == 0:
                with suppress(OSError, InputError):
                    inside.remove()
            raise

    def _write(self, inside: Folder, mine: Mine, state: bytes, require: Callable[[], None], world: World) -> int:
        needed = int(world.sum_(torch.tensor(mine.bytes()))) + len(state)
        with alike(world):
            require_room(inside, needed)
        facts = torch.zeros(len(mine.parts), 8 + _DIGEST, dtype=torch.uint8)
        with alike(world), filling(inside, needed):
            for number, (kind, held) in enumerate(mine.parts.items()):
                if held:
                    starts = {key: mine.first_rows[key] for key in held.keys() & mine.first_rows.keys()}
                    size, digest = write_tensors(inside, _file(kind, world.rank), held, starts)
                    facts[number] = torch.frombuffer(bytearray(size.to_bytes(8, "little") + digest), dtype=torch.uint8)
        every = world.gather_rows(facts, [len(facts)] * world.size).numpy()
        names = [_file(kind, rank) for rank in range(world.size) for kind in mine.parts]
        files = {
            file: {"bytes": int.from_bytes(fact[:8].tobytes(), "little"), "sha256": fact[8:].tobytes().hex()}
            for file, fact in zip(names, every, strict=True)
            if fact.any()
        }
        files[_STATE] = {"bytes": len(state), "sha256": sha256(state)}
        with alike(world), filling(inside, needed):
            if world.rank == 0:
                inside.write_bytes(state, _STATE)
                require()
                inside.write_json({"format": FORMAT, "workers": world.size, "files": files}, _COMPLETE)
        return sum(entry["bytes"] for entry in files.values())

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
        for file in self._needed(inside, tensors):
            for key, stored in stored_tensors(inside, file).items():
                if key not in tensors:
                    raise ValueError(f"'{file}' holds '{key}', which this model does not have")
                value = tensors[key]
                local = value.to_local() if isinstance(value, DTensor) else value
                if stored.dtype != local.dtype or stored.shape[1:] != tuple(local.shape[1:]):
                    raise ValueError(f"'{key}' is {list(stored.shape)} {stored.dtype} in '{file}'")
                first, stop = self._rows(value)
                count = stored.shape[0] if stored.shape else 1
                if stored.first_row + count > (value.shape[0] if value.dim() else 1):
                    raise ValueError(f"'{file}' holds more rows of '{key}' than this model has")
                low, high = max(first, stored.first_row), min(stop, stored.first_row + count)
                if low < high:
                    into = local[low - first : high - first] if local.dim() else local
                    read_rows(inside, file, stored, low - stored.first_row, into)
                    left[key] -= high - low
        missing = [key for key, rows in left.items() if rows]
        if missing:
            raise ValueError(f"it lacks rows of '{missing[0]}'")

    def _needed(self, inside: Folder, tensors: dict[str, torch.Tensor]) -> list[str]:
        """The files of a checkpoint that may hold rows of mine: all `whole` ones, and a few of the others."""
        complete = _complete(inside)
        files = {} if complete is None else complete["files"]
        writers = 1 if complete is None else complete["workers"]
        ranges = [(value.shape[0], self._rows(value)) for value in tensors.values() if isinstance(value, DTensor)]
        needed = []
        for rank in range(writers):
            theirs = [(Partition(rows, writers), mine) for rows, mine in ranges]
            if any(first < part.stop(rank) and part.start(rank) < stop for part, (first, stop) in theirs):
                needed.append(_file("rows", rank))
            needed.append(_file("whole", rank))
        return [file for file in needed if file in files]

    def defect(self, name: str) -> str | None:
        """Compare every file of checkpoint `name` with its SHA-256; ranks share the work. Collective.

        Returns:
            A phrase that names a bad file, the same on every rank, or None.

        Raises:
            StorageError: a file cannot be read now.
        """
        if name in self._intact:
            return None
        inside = self.folder.folder(name)
        listed = listed_files(inside) or {}
        names = [_COMPLETE, *sorted(listed)]
        bad = 0 if listed else 1  # 1 + the index of a bad file
        for number in range(1 + self.world.rank, len(names), self.world.size):
            if not _is_intact(inside, names[number], listed[names[number]]):
                bad = 1 + number
        worst = int(self.world.max_(torch.tensor(bad)))
        if not worst:
            self._intact.add(name)
            return None
        file = names[worst - 1] if worst <= len(names) else "a file"
        if not inside.exists(file):
            return f"'{file}' is missing"
        return f"'{file}' does not match complete.json"

    def newest_intact(self) -> tuple[str | None, dict[str, str]]:
        """The newest checkpoint whose files all match their SHA-256, or None if there is no complete one. Collective.

        Returns:
            Its name, and the defects of newer checkpoints by name.

        Raises:
            InputError: every complete checkpoint is damaged, or one has a format that is not read.
        """
        defects: dict[str, str] = {}
        for name in reversed(self._agreed_names()):
            require_readable(self.folder.folder(name))
            defect = self.defect(name)
            if defect is None:
                return name, defects
            defects[name] = defect
        complete = [name for name in defects if listed_files(self.folder.folder(name)) is not None]
        if self.world.max_(torch.tensor(len(complete))):
            name = complete[0] if complete else next(iter(defects))
            raise InputError(
                f"every checkpoint in '{self.folder}' is damaged (the newest, '{name}': {defects[name]}); restore one, "
                "delete that folder to train from the beginning, or use another 'run.name'."
            )
        return None, defects

    def _agreed_names(self) -> list[str]:
        """`names` as rank 0 sees them, on every rank, since a shared disk may show a new folder late. Collective."""
        if self.world.size == 1:
            return self.names()
        places = torch.tensor([checkpoint_place(name) for name in self.names()], dtype=torch.int64).reshape(-1, 2)
        count = int(self.world.sum_(torch.tensor(len(places) if self.world.rank == 0 else 0)))
        agreed = self.world.rows_from(0, places, 0, count)
        return [checkpoint_name(int(epoch), int(step)) for epoch, step in agreed]

    def names(self) -> list[str]:
        """The names of all checkpoints, complete or not, oldest first. Other names in the folder are not ours."""
        return [name for name in self.folder.names() if is_checkpoint(name)]

    def state(self, name: str) -> dict[str, Any]:
        """The content of `state.json` in checkpoint `name`."""
        state: dict[str, Any] = self.folder.read_json(name, _STATE)
        return state

    def remove_torn(self) -> None:
        """Delete the checkpoints that were never completed: the processes that wrote them died. For one rank."""
        for name in self.names():
            if not self.folder.exists(name, _COMPLETE):
                self.folder.remove(name)

    def keep_only(self, names: set[str]) -> None:
        """Delete all checkpoints except `names`. For one rank."""
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
    complete = _complete(folder)
    return None if complete is None else dict(complete["files"])


def _complete(folder: Folder) -> dict[str, Any] | None:
    try:
        return dict(checked(folder.read_bytes(_COMPLETE), _Complete))
    except (FileNotFoundError, ValueError):
        return None


def is_complete(folder: Folder) -> bool:
    """Whether every file that `complete.json` lists exists with the listed size."""
    listed = listed_files(folder)
    if listed is None:
        return False
    try:
        return all(folder.size(name) == entry["bytes"] for name, entry in listed.items())
    except FileNotFoundError:
        return False


def require_complete(folder: Folder) -> None:
    """Check that a checkpoint has all its files, without reading them.

    Raises:
        InputError: a file is missing or has another size, or the format is not read.
    """
    require_readable(folder)
    if not is_complete(folder):
        raise InputError(f"checkpoint '{folder}' is incomplete or missing; {_REMEDY}.")


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
        return folder.size(name) == entry["bytes"] and folder.sha256(name) == entry["sha256"]
    except StorageError:  # says nothing about the file
        raise
    except (FileNotFoundError, InputError):  # InputError: a folder is there instead
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
