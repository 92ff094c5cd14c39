"""What runs and sweeps share: a folder with an identity, a list of attempts, and the config of the last attempt."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any, ClassVar, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from distrec.config.paths import located
from distrec.config.run import PlaceSection, TrackingSection
from distrec.config.text import write_yaml
from distrec.data.storage import Folder, open_folder
from distrec.errors import InputError, Interrupted, NonFiniteLoss, StorageError, WorkersFailed, exit_status, shown

_SHOWN_SECONDS = 20.0  # that a shared disk may take to show one host what another has written

C = TypeVar("C", bound="Config")
F = TypeVar("F", bound="AttemptFolder")


class Config(Protocol):
    """The parts that the configs of runs and sweeps share."""

    @property
    def run(self) -> PlaceSection: ...

    @property
    def data(self) -> str: ...

    @property
    def tracking(self) -> TrackingSection: ...

    def model_dump(self) -> dict[str, Any]: ...

    def model_copy(self: C, *, update: Mapping[str, Any]) -> C: ...


class Record(BaseModel):
    """The part of a JSON file that is read again; further keys are kept and not looked at."""

    model_config = ConfigDict(extra="allow", strict=True)


class Identity(Record):
    """The settings that all attempts share."""

    data: str


class AttemptFolder:
    """A folder `<run.storage>/<run.name>` with a record that every attempt extends.

    Attributes:
        what: "run" or "sweep".
        record_file: name of the JSON file with `identity`, `attempts` and other facts about the run or sweep.
        record_shape: what must be in it.
        config_file: name of the YAML file with the resolved config of the last attempt.
        files: paths of all files in the folder that are written again.
        folders: names of all folders in it.
    """

    what: ClassVar[str]
    record_file: ClassVar[str]
    record_shape: ClassVar[type[Record]]
    config_file: ClassVar[str]
    files: ClassVar[Sequence[str]]
    folders: ClassVar[Sequence[str]]

    def __init__(self, folder: Folder):
        self.folder = folder

    @classmethod
    def of(cls: type[F], config: Config) -> F:
        """The folder that a config names."""
        return cls(open_folder(config.run.storage).folder(config.run.name))

    @property
    def record(self) -> dict[str, Any]:
        """The contents of the record.

        Raises:
            InputError: the record cannot be read, or is damaged.
        """
        return read_record(
            self.folder, self.record_shape, self.record_file,
            remedy=f"restore the file, use another 'run.name', or delete '{self.folder}'",
        )  # fmt: skip

    def check_kinds(self) -> None:
        """Check that every file of the folder is a file, and every folder a folder. An object store has no folders.

        Raises:
            InputError: names the first one that is not.
        """
        if not self.folder.local:
            return
        for names, kind, found in ((self.files, "a file", "a folder"), (self.folders, "a folder", "no folder")):
            for path in map(self.folder.at, names):
                if os.path.lexists(path) and os.path.isdir(path) == (names is self.files):
                    raise InputError(
                        f"'{path}' is {found}, but a {self.what} keeps {kind} there; move it away, or use another "
                        "'run.name'."
                    )

    def update_record(self, **fields: Any) -> None:
        """Set fields of the record."""
        self.folder.write_json({**self.record, **fields}, self.record_file)

    def attempts(self) -> int:
        """How many attempts the record counts."""
        return len(self.record["attempts"])

    def shows_attempt(self, attempt: int) -> bool:
        """Whether the record has that many attempts, as seen from here. A shared disk may show it some seconds late."""
        until = time.monotonic() + _SHOWN_SECONDS
        while True:
            with suppress(InputError):
                if self.attempts() >= attempt:
                    return True
            if time.monotonic() > until:
                return False
            time.sleep(0.5)

    def note(self, **facts: Any) -> None:
        """Record facts about the current attempt in the record."""
        attempts = self.record["attempts"]
        attempts[-1].update(facts)
        self.update_record(attempts=attempts)

    def note_outcome(self, error: BaseException | None) -> None:
        """Record how the current attempt ended, unless that is known: with an error, or done."""
        if self.record["attempts"][-1].get("outcome") is not None:
            return
        if error is None:
            self.note(outcome="done")
            return
        known = isinstance(error, InputError | Interrupted | NonFiniteLoss | WorkersFailed)
        text = str(error).strip() or type(error).__name__
        self.note(
            outcome=type(error).__name__ if known else "failed",
            message=text if known else shown(text.partition("\n")[0], 500, quoted=False),
            exit_status=exit_status(error),
        )

    def _opened(self) -> dict[str, Any] | None:
        """Create the folder if needed. Returns its record, or None if there is none yet."""
        self.folder.make()
        return self.record if self.folder.exists(self.record_file) else None

    def _write_attempt(self, config: Config, record: dict[str, Any], **attempt: Any) -> None:
        """Write the config, and add an attempt that starts now to the record."""
        self.folder.write_bytes(to_yaml(config), self.config_file)
        record["attempts"].append({"started": now(), **attempt})
        self.folder.write_json(record, self.record_file)


def read_record(folder: Folder, shape: Any, *parts: str, remedy: str) -> Any:
    """The value in a JSON file of a run or sweep.

    Args:
        shape: the type that the value must have, as pydantic checks it: a `Record`, a dataclass, `list[...]`.
        remedy: what to do about a damaged file, for the message.

    Raises:
        InputError: the file cannot be read, is not JSON, or holds a value of another shape.
    """
    try:
        return checked(folder.read_bytes(*parts), shape)
    except FileNotFoundError:
        problem = "it is missing"
    except ValueError as error:
        problem = str(error)
    raise InputError(f"'{folder.folder(*parts)}' cannot be used ({problem}); {remedy}.")


def checked(data: bytes, shape: Any) -> Any:
    """The JSON value in `data`, which must have the shape that `read_record` describes.

    Raises:
        ValueError: says in a few words what is wrong.
    """
    if not data.strip(b" \t\r\n\0"):
        raise ValueError("it is empty")
    try:
        _adapter(shape).validate_json(data, strict=True)
        return json.loads(data)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
    except (ValueError, RecursionError):
        raise ValueError("it is not JSON") from None
    key = ".".join(map(str, problem["loc"]))
    if problem["type"] == "json_invalid":
        raise ValueError("it is not JSON")
    if problem["type"] == "missing":
        raise ValueError(f"key '{key}' is missing")
    told = problem["msg"].removeprefix("Input should be ")
    raise ValueError(f"key '{key}' must be {told}" if key else "it holds something else")


@cache
def _adapter(shape: Any) -> TypeAdapter[Any]:  # building one takes longer than checking a small file
    return TypeAdapter(shape)


@contextmanager
def writing_to(storage: str) -> Iterator[None]:
    """Turn errors of the file system into an `InputError` about key `run.storage`, whose value is `storage`.

    Raises:
        InputError: the file system raised an error. StorageError: an object store did not answer in time.
    """
    try:
        yield
    except TimeoutError as error:
        raise StorageError(f"key 'run.storage' is '{storage}', which cannot be written now ({error}).") from None
    except OSError as error:
        raise InputError(
            f"key 'run.storage' is '{storage}', which cannot be written ({error}); give a writable folder."
        ) from None


def with_absolute_paths(config: C) -> C:
    """Make the local paths of a config absolute, because workers and trials may have another working folder.

    Raises:
        InputError: as in `located`; the message names the key.
    """
    paths = {
        key: located(path, f"key 'run.{key}':")
        for key, path in config.run.model_dump(exclude={"name"}).items()
        if path is not None
    }
    tracking = config.tracking
    if (uri := tracking.mlflow) and ":" not in uri and not uri.startswith("databricks"):  # the folder of a file store
        tracking = tracking.model_copy(update={"mlflow": located(uri, "key 'tracking.mlflow':")})
    data, run = located(config.data, "key 'data':"), config.run.model_copy(update=paths)
    return config.model_copy(update={"data": data, "run": run, "tracking": tracking})


def to_yaml(config: Config) -> bytes:
    """A config as YAML, with the keys in the order of the sections."""
    return write_yaml(config.model_dump()).encode()


def now() -> str:
    """The current time in UTC, such as 2026-01-31T12:00:00Z."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def first_difference(old: dict[str, Any], new: dict[str, Any]) -> tuple[str, Any, Any] | None:
    """The first dotted key at which two identities differ, with its old and new value; None if they are equal."""
    before, after = flat(old), flat(new)
    for key in {**after, **before}:  # a section set to null, such as lr_decay, has keys on one side only
        if before.get(key) != after.get(key):
            return key, before.get(key), after.get(key)
    return None


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaf values of nested sections, by dotted key."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out
