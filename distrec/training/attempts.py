"""What a run and a sweep have in common: a folder with its identity, its attempts and the config of the last one."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, Protocol, TypeVar

import yaml

from distrec.config.run import RunSection
from distrec.data.storage import Folder, located, open_folder
from distrec.errors import InputError

C = TypeVar("C", bound="Config")
F = TypeVar("F", bound="AttemptFolder")


class Config(Protocol):
    """The config of a run or of a sweep, as far as they are alike."""

    @property
    def run(self) -> RunSection: ...

    @property
    def data(self) -> str: ...

    def model_dump(self) -> dict[str, Any]: ...

    def model_copy(self: C, *, update: Mapping[str, Any]) -> C: ...


class AttemptFolder:
    """A folder `<run.storage>/<run.name>` whose record is written again with every attempt.

    Attributes:
        record_file: JSON with `identity`, `attempts` and what else is told of the whole.
        config_file: YAML, the resolved config of the last attempt.
    """

    record_file: ClassVar[str]
    config_file: ClassVar[str]

    def __init__(self, folder: Folder):
        self.folder = folder

    @classmethod
    def of(cls: type[F], config: Config) -> F:
        """The folder of a config."""
        return cls(open_folder(config.run.storage).folder(config.run.name))

    @property
    def record(self) -> dict[str, Any]:
        """The contents of the record."""
        value: dict[str, Any] = self.folder.read_json(self.record_file)
        return value

    def update_record(self, **fields: Any) -> None:
        """Set fields of the record."""
        self.folder.write_json({**self.record, **fields}, self.record_file)

    def _opened(self) -> dict[str, Any] | None:
        """Make the folder. Returns its record, or None where there is none yet."""
        self.folder.make()
        return self.record if self.folder.exists(self.record_file) else None

    def _write_attempt(self, config: Config, record: dict[str, Any], **attempt: Any) -> None:
        """Write the config, and the record with one more attempt, which starts now."""
        self.folder.write_bytes(to_yaml(config), self.config_file)
        record["attempts"].append({"started": now(), **attempt})
        self.folder.write_json(record, self.record_file)


@contextmanager
def writing_to(storage: str) -> Iterator[None]:
    """Turn an error of the file system into a sentence about key `run.storage`, whose value is `storage`.

    Raises:
        InputError: there was one.
    """
    try:
        yield
    except OSError as error:
        raise InputError(
            f"key 'run.storage' is '{storage}', which cannot be written ({error}); give a writable folder."
        ) from None


def with_absolute_paths(config: C) -> C:
    """`config` with absolute local paths, since workers and trials do not share this process's working folder."""
    graphs = config.run.graphs and located(config.run.graphs)  # of runs: a sweep's trials share one in its folder
    run = config.run.model_copy(update={"storage": located(config.run.storage), "graphs": graphs})
    return config.model_copy(update={"data": located(config.data), "run": run})


def to_yaml(config: Config) -> bytes:
    """The text of a config file, keys in the order of the sections."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False).encode()


def now() -> str:
    """The time, in UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def first_difference(old: dict[str, Any], new: dict[str, Any]) -> tuple[str, Any, Any] | None:
    """The first dotted key at which two identities differ, its old value and its new one; None where they are equal."""
    before, after = flat(old), flat(new)
    for key in {**after, **before}:  # a section that became null, such as lr_decay, has keys on one side only
        if before.get(key) != after.get(key):
            return key, before.get(key), after.get(key)
    return None


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of nested sections by dotted key."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out
