"""What a job gets of the working directory: which files are sent, how large they are, and what is left out."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from distrec.config.paths import PATH_WIDTH, unwritable
from distrec.errors import InputError, first_few, shown
from distrec.submission.ray_internals import most_bytes, packed

# As in a .gitignore of the working directory. Besides these, folders with one of MARKS are left out.
EXCLUDED = (
    ".git", ".venv", "venv", "node_modules", "*.egg-info", "/build",
    "__pycache__", "*.pyc", ".pytest_cache", ".mypy_cache", ".ruff_cache", ".hypothesis", ".ipynb_checkpoints",
    "*.safetensors", "*.parquet",
    ".env", ".netrc", ".aws", ".ssh", "*.pem",  # files that often hold credentials
)  # fmt: skip
# What a folder is that has all of these entries.
MARKS = {
    "environment": (("pyvenv.cfg",), ("conda-meta",)),
    "prepared dataset": (("manifest.json", "interactions"),),
    "run": (("run.json", "config.yaml"), ("complete.json",)),  # the latter: a checkpoint by itself
    "sweep": (("sweep.json", "sweep.yaml"),),
}
_ENTRY = 30 + 46  # bytes of a file's two headers in a ZIP archive, besides its name in each
_END = 22  # bytes at the end of an archive
_MOST_NAMED = 5  # of the largest files, in a message


@dataclass(frozen=True)
class Upload:
    """The part of a working directory that a job gets.

    Attributes:
        folder: the working directory, absolute.
        excludes: the patterns for Ray's client.
        files: bytes by path relative to `folder`, with "/" at the end of an empty folder.
        left_out: kinds of folders left out because of what they contain, by number.
    """

    folder: Path
    excludes: list[str]
    files: dict[str, int]
    left_out: Counter[str]

    @classmethod
    def of(cls, folder: Path) -> Upload:
        """What would be sent of `folder`."""
        folder = folder.absolute()
        marked: dict[Path, str] = {}

        def left_out(path: Path) -> bool:
            kind = None if path == folder else _kind(path)
            if kind is not None:
                marked[path] = kind
            return kind is not None

        try:
            found = packed(folder, EXCLUDED, left_out)
        except OSError as error:
            raise InputError(
                f"the working folder '{folder}' cannot be read ({error}); name what the job does not need in a file "
                ".rayignore there."
            ) from None
        for path in found:
            if unwritable(str(path)) is not None or not os.access(path, os.R_OK):
                raise InputError(
                    f"file {shown(str(path), PATH_WIDTH)} cannot be sent, since its name is not UTF-8 or you may not "
                    "read it; correct that, or name it in a file .rayignore beside it."
                )
        files = {_name(path, folder): path.stat().st_size if path.is_file() else 0 for path in found}
        excludes = [*EXCLUDED, *(pattern(path.relative_to(folder).as_posix()) for path in sorted(marked))]
        return cls(folder, excludes, files, Counter(marked.values()))

    @property
    def bytes(self) -> int:
        """Size of the package, which Ray does not compress."""
        return _END + sum(_ENTRY + 2 * len(name.encode()) + size for name, size in self.files.items())

    def told(self) -> str:
        """One line about it."""
        line = f"upload: {len(self.files):,} files, {size(self.bytes)}, from '{self.folder}'"
        kinds = [f"{count} {kind}{'s' if count > 1 else ''}" for kind, count in self.left_out.items()]
        return f"{line}; left out: {', '.join(kinds)}" if kinds else line

    def require_size(self) -> None:
        """Refuse what the cluster would not take.

        Raises:
            InputError: the package is too large; the message names the largest files.
        """
        if self.bytes > (most := most_bytes()):
            largest = sorted(self.files, key=self.files.__getitem__, reverse=True)
            names = (f"{shown(name, 100)} ({size(self.files[name])})" for name in largest)
            raise InputError(
                f"the upload of '{self.folder}' is {size(self.bytes)}, but the cluster takes at most {size(most)}; "
                "name what the job does not need in a file .rayignore there, and put data on storage that all hosts "
                f"share; the largest files: {first_few(names, len(largest), _MOST_NAMED)}."
            )

    def require(self, path: str, what: str) -> None:
        """Refuse a job that needs a file which would not be there.

        Args:
            path: the path as the job will read it, which must be relative to the working directory.
            what: what it is, for the message, such as "config file".

        Raises:
            InputError: the path is absolute, outside the working directory, not there, or left out of the upload.
        """
        name = f"{what} {shown(path, PATH_WIDTH)}"
        given = Path(path).expanduser()
        inside = Path(os.path.normpath(self.folder / given))  # links are not followed: the job has a copy
        if not inside.is_relative_to(self.folder):
            raise InputError(
                f"{name} is outside the working folder '{self.folder}', which is what the job gets; copy it there, or "
                "run this command in a folder above both."
            )
        relative = inside.relative_to(self.folder).as_posix()
        if given.is_absolute():
            raise InputError(f"{name} is absolute, and the job has its own copy elsewhere; write '{relative}'.")
        if relative in self.files:
            return
        if inside.exists():
            raise InputError(
                f"{name} is not part of the upload: a .gitignore or .rayignore, or a rule of distrec for environments, "
                "data and runs, leaves it out; copy it to another folder, such as configs/."
            )
        raise InputError(f"{name} does not exist in the working folder '{self.folder}'; correct the path.")


def pattern(path: str) -> str:
    """The pattern of a .gitignore that matches exactly `path`, which is relative to its folder."""
    escaped = re.sub(r"([\\*?\[\]])", r"\\\1", path)
    return "/" + escaped.replace(" ", "[ ]")  # a space at the end would be stripped, escaped or not


def size(count: int) -> str:
    """Bytes for people."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} bytes"


def _kind(path: Path) -> str | None:
    if not path.is_dir():
        return None
    return next((kind for kind, marks in MARKS.items() if any(_has(path, entries) for entries in marks)), None)


def _has(path: Path, entries: Iterable[str]) -> bool:
    return all((path / entry).exists() for entry in entries)


def _name(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix() + ("/" if path.is_dir() else "")
