"""Reads a sweep folder in any state: absent files are empty, torn files are recorded, and neither is an error."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from distrec.config.text import read_yaml
from distrec.data.storage import Folder
from distrec.errors import InputError


class Reader:
    """Reads files of a sweep. `unreadable` lists files that exist but could not be read."""

    def __init__(self, folder: Folder):
        self.folder = folder
        self.unreadable: list[str] = []

    def mapping(self, *parts: str) -> dict[str, Any]:
        """A JSON object; empty if the file is absent or unreadable."""
        data = self._bytes(*parts)
        if data is None:
            return {}
        try:
            value = json.loads(data)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            self.unreadable.append("/".join(parts))
            return {}
        return value

    def epochs(self, *parts: str) -> list[dict[str, Any]]:
        """The records of a `metrics.jsonl`, one for each epoch, up to the first torn line."""
        out: list[dict[str, Any]] = []
        for line in (self._bytes(*parts) or b"").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                self.unreadable.append("/".join(parts))
                break
            if isinstance(record, dict) and "epoch" in record:
                out.append(record)
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
        InputError: there is no sweep at `path`.
    """
    if not folder.exists("sweep.yaml"):
        there = "another folder's content" if folder.names() else "nothing"
        raise InputError(
            f"'{path}' holds no sweep (no sweep.yaml, {there} is there); "
            "give the folder <run.storage>/<run.name> that 'distrec tune' wrote."
        )
    try:
        settings = read_yaml(folder.read_bytes("sweep.yaml"), "sweep.yaml")
    except InputError:
        settings = None
    if not isinstance(settings, dict) or not isinstance(settings.get("methods"), dict):
        raise InputError(
            f"'{path}' holds no sweep that can be read (sweep.yaml has no methods); "
            "run 'distrec tune' with its config again."
        )
    return settings


def runs(reader: Reader, kind: str) -> list[tuple[str, dict[str, Any]]]:
    """Name and `trial.json` of every run under `kind` that belongs to an entry, ordered by name.

    `kind` is `trials` or `final`.
    """
    named = [(name, reader.mapping(kind, name, "trial.json")) for name in reader.folder.names(kind)]
    return [(name, record) for name, record in named if isinstance(record.get("entry"), str)]
