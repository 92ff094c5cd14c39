"""Reads a sweep folder in any state: absent files are empty, damaged files are recorded, and neither is an error."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from pydantic import Field, TypeAdapter, ValidationError

from distrec.config.text import read_yaml
from distrec.data.storage import Folder
from distrec.errors import InputError
from distrec.training.attempts import Record, checked

Metrics = dict[str, float | None]


class _Data(Record):
    name: str | None = None
    hash: str | None = None
    split: str | None = None
    users: int | None = None
    items: int | None = None
    interactions: dict[str, int] = Field({})


class _Described(Record):
    title: str | None = None
    method: str | None = None
    reads_content: bool | None = None


class _Published(Record):
    entry: str
    source: str | None = None
    note: str | None = None
    metrics: Metrics = Field({})


class _Attempt(Record):
    started: str | None = None


class _Sweep(Record):
    attempts: list[_Attempt] = Field([])
    seconds: float | None = None
    cpus: float | None = None
    closed: str | None = None
    done: str | None = None
    data: _Data | None = None
    entries: dict[str, _Described] = Field({})
    versions: dict[str, str] = Field({})
    winners: dict[str, str] = Field({})
    published: list[_Published] = Field([])


class _Trial(Record):
    entry: str
    number: int = 0
    values: dict[str, Any] = Field({})
    cpus: float | None = None
    seed: int | None = None
    status: str = "waiting"
    reason: str | None = None
    failures: int = 0
    seconds: float | None = None
    pause: int | None = None
    parent: str | None = None
    born: int = 0


class _Run(Record):
    attempts: list[_Attempt] = Field([])
    degradations: list[str] = Field([])
    versions: dict[str, str] = Field({})


class _Summary(Record):
    best_epoch: int | None = None
    valid: Metrics | None = None
    test: Metrics | None = None
    users: dict[str, int] = Field({})
    evaluations_since_best: int | None = None
    peak_memory_bytes: float | None = None


class _Epoch(Record):
    epoch: int
    valid: Metrics | None = None
    seconds: Metrics | None = None
    peak_memory_bytes: float | None = None


class _Slice(Record):
    meaning: str
    users: int
    metrics: Metrics


class _Evaluation(Record):
    slices: dict[str, _Slice] = Field({})


class _Evaluate(Record):
    mask: str


class _Settings(Record):
    run: dict[str, Any]
    data: str
    methods: dict[str, dict[str, Any]]
    metric: str
    searcher: str
    scheduler: str
    seed: int
    seeds: int
    budget: dict[str, float | None]
    resources: dict[str, float | None]
    evaluate: _Evaluate


SHAPES: dict[str, Any] = {
    "sweep.json": _Sweep,
    "trial.json": _Trial,
    "run.json": _Run,
    "summary.json": _Summary,
    "test.json": _Evaluation,
}


class Reader:
    """Reads files of a sweep. `unreadable` lists files that exist but could not be read, or hold something else."""

    def __init__(self, folder: Folder):
        self.folder = folder
        self.unreadable: list[str] = []

    def mapping(self, *parts: str) -> dict[str, Any]:
        """A JSON object; empty if the file is absent or unreadable."""
        data = self._bytes(*parts)
        if data is None:
            return {}
        try:
            value: dict[str, Any] = checked(data, SHAPES.get(parts[-1], Record))
        except ValueError:
            self.unreadable.append("/".join(parts))
            return {}
        return value

    def epochs(self, *parts: str) -> list[dict[str, Any]]:
        """The records of a `metrics.jsonl`, one for each epoch, up to the first damaged line."""
        out: list[dict[str, Any]] = []
        for line in (self._bytes(*parts) or b"").splitlines():
            try:
                out.append(checked(line, _Epoch))
            except ValueError:
                self.unreadable.append("/".join(parts))
                break
        return out

    def yaml(self, *parts: str) -> dict[str, Any]:
        """A YAML mapping; empty if the file is absent or unreadable."""
        data = self._bytes(*parts)
        try:
            value = read_yaml(data or b"{}", "/".join(parts))
        except InputError:
            value = None
        if not isinstance(value, dict):
            self.unreadable.append("/".join(parts))
            return {}
        return value

    def text(self, *parts: str) -> str | None:
        """The content of a text file; None if it is absent or unreadable."""
        data = self._bytes(*parts)
        return None if data is None else data.decode("utf-8", "replace")

    def users(self, metric: str, *parts: str) -> tuple[np.ndarray, np.ndarray] | None:
        """Users `[users]` and their values of a metric `[users]` from a `test-users.parquet`.

        None if the file is absent or unreadable.
        """
        data = self._bytes(*parts)
        if data is None:
            return None
        try:
            table = pq.read_table(io.BytesIO(data), columns=["user", metric])
            return table["user"].to_numpy(), table[metric].to_numpy()
        except (OSError, ValueError, KeyError):  # pyarrow's errors are subclasses of these
            self.unreadable.append("/".join(parts))
            return None

    def _bytes(self, *parts: str) -> bytes | None:
        try:
            return self.folder.read_bytes(*parts)
        except FileNotFoundError:
            return None
        except InputError:
            self.unreadable.append("/".join(parts))
            return None


def read_settings(folder: Folder, path: str) -> dict[str, Any]:
    """The content of `sweep.yaml` of the sweep at `path`.

    Raises:
        InputError: there is no sweep at `path`, or its config is damaged.
    """
    if not folder.exists("sweep.yaml"):
        there = "another folder's content" if folder.names() else "nothing"
        raise InputError(
            f"'{path}' holds no sweep (no sweep.yaml, {there} is there); "
            "give the folder <run.storage>/<run.name> that 'distrec tune' wrote."
        )
    try:
        settings: dict[str, Any] = read_yaml(folder.read_bytes("sweep.yaml"), "it")
        TypeAdapter(_Settings).validate_python(settings)
        return settings
    except (OSError, InputError) as error:
        problem = str(error).splitlines()[0].rstrip(".")
    except ValidationError as error:
        told = error.errors(include_url=False)[0]
        key = ".".join(map(str, told["loc"]))
        problem = f"key '{key}': {told['msg'][0].lower()}{told['msg'][1:]}" if key else "it holds no keys and values"
    raise InputError(
        f"'{path}' holds no sweep that can be read (sweep.yaml: {problem}); run 'distrec tune' with its config again."
    )


def runs(reader: Reader, kind: str) -> list[tuple[str, dict[str, Any]]]:
    """Name and `trial.json` of every run under `kind` that belongs to an entry, ordered by name.

    `kind` is `trials` or `final`.
    """
    named = [(name, reader.mapping(kind, name, "trial.json")) for name in reader.folder.names(kind)]
    return [(name, record) for name, record in named if record]
