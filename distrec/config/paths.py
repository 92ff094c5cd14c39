"""The one place that says what a path from a config or the command line means."""

from __future__ import annotations

import os
import re

from distrec.errors import InputError, shown

REMOTE = "s3://"
_UNWRITABLE = re.compile("[\0\ud800-\udfff]")
PATH_WIDTH = 300  # characters of a path that a message shows
# A protocol, such as http://, or s3:/ with a slash missing. A local folder of such a name can be written ./s3:/.
_PROTOCOL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/")


def unwritable(text: str) -> str | None:
    """The first NUL or half of a surrogate pair, which no path and no text file can hold; None if there is none."""
    found = _UNWRITABLE.search(text)
    return None if found is None else found[0]


def located(path: str, what: str = "path") -> str:
    """A path as every process understands it: a local one absolute, with the home folder for `~`, or an `s3://` URL.

    Args:
        path: a local path, relative or absolute, or an `s3://` URL.
        what: what the path is, for errors, such as "option '--out':".

    Raises:
        InputError: the path is empty or has another protocol, no bucket, an unknown user after `~`, or a character
            that no path can hold.
    """
    name = f"{what} {shown(path, PATH_WIDTH)}"
    if not path.strip():
        raise InputError(f"{name} is empty; give a folder, or '.' for the current one.")
    if unwritable(path) is not None:
        raise InputError(f"{name} holds a character that is not UTF-8 text; give another path.")
    if path.startswith(REMOTE):
        if not path[len(REMOTE) :].strip("/") or path[len(REMOTE)] == "/":
            raise InputError(f"{name} has no bucket; write s3://bucket/folder.")
        return path
    if _PROTOCOL.match(path):
        raise InputError(
            f"{name} is neither a local path nor an s3:// URL, and nothing else is supported; give one of these."
        )
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        user = path.partition("/")[0]
        raise InputError(f"{name} names a user that does not exist; for a folder of that name, write './{user[:60]}'.")
    return os.path.abspath(expanded)


def local_path(path: str, what: str) -> str:
    """A path to something that is read from a local disk only, such as a config file, as an absolute path.

    Raises:
        InputError: as in `located`, or the path is an `s3://` URL.
    """
    if (found := located(path, what)).startswith(REMOTE):
        raise InputError(f"{what} {shown(path, PATH_WIDTH)} must be on a local disk; copy it, and give its local path.")
    return found
