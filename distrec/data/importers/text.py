"""Text files as blocks of checked UTF-8: unpacked, decoded, without NUL bytes."""

from __future__ import annotations

import codecs
import gzip
import zlib
from collections.abc import Iterator
from typing import IO

from distrec.data.importers.formats import Form
from distrec.errors import InputError

BLOCK = 1 << 24
"""Bytes read at a time."""

_MAGIC = {
    b"PK\x03\x04": "a ZIP archive",
    b"PK\x05\x06": "a ZIP archive",
    b"\x1f\x8b": "compressed with gzip",
    b"PAR1": "a Parquet file",
    b"BZh": "compressed with bzip2",
    b"\xfd7zXZ\x00": "compressed with xz",
    b"\x28\xb5\x2f\xfd": "compressed with zstd",
    b"7z\xbc\xaf\x27\x1c": "a 7-Zip archive",
    b"SQLite format 3\x00": "an SQLite database",
    b"\x93NUMPY": "a NumPy array",
    b"%PDF-": "a PDF document",
}
_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


def blocks(path: str, form: Form, size: int | None = None) -> Iterator[bytes]:
    """The text of a file in UTF-8, without a byte order mark, in blocks of about `size` bytes cut anywhere.

    Args:
        path: Path of a local copy of the file.
        form: The file's form; its name is used in messages.
        size: Bytes read at a time, by default `BLOCK`.

    Raises:
        InputError: the file cannot be read or unpacked, is not text, or is not in the encoding.
    """
    try:
        with open(path, "rb") as plain:
            yield from _decoded(gzip.GzipFile(fileobj=plain) if form.packed else plain, form, size or BLOCK)
    except (OSError, EOFError, zlib.error) as error:
        raise unreadable(form.name, "gzip" if form.packed else "text", error) from None


def _decoded(file: IO[bytes] | gzip.GzipFile, form: Form, size: int) -> Iterator[bytes]:
    line = 1
    decoder: codecs.IncrementalDecoder | None = None
    encoding = ""
    while True:
        raw = file.read(size)
        if decoder is None:
            _refuse_binary(raw, form)
            encoding = form.options.encoding or next((_MARKS[m] for m in _MARKS if raw.startswith(m)), "utf-8")
            if codecs.lookup(encoding).name == "utf-8":
                encoding = "utf-8-sig"  # also reads UTF-8 without the mark
            decoder = codecs.getincrementaldecoder(encoding)()
        try:
            data = decoder.decode(raw, final=not raw).encode()
        except UnicodeError as error:
            raise _undecodable(error, encoding, line, form) from None
        if b"\0" in data:
            line += data[: data.index(b"\0")].count(b"\n")
            raise InputError(
                f"file '{form.name}' has a NUL byte in line {line}, so it is not text in this encoding; give text "
                f"(for UTF-16 without a byte order mark, {form.setting('encoding: utf-16-le', 'convert it to UTF-8')})."
            )
        line += data.count(b"\n")
        if data:
            yield data
        if not raw:
            return


def _refuse_binary(head: bytes, form: Form) -> None:
    for magic, what in _MAGIC.items():
        if head.startswith(magic):
            remedy = "end its name in .gz" if magic == b"\x1f\x8b" and not form.packed else "give plain text"
            raise InputError(f"file '{form.name}' is {what}, not text; {remedy}.")


def _undecodable(error: UnicodeError, encoding: str, line: int, form: Form) -> InputError:
    """The error for a byte that the encoding does not know; `line` is the line in which the block begins."""
    what = "the text"
    if isinstance(error, UnicodeDecodeError):
        line += error.object[: error.start].count(b"\n")
        what = f"byte 0x{error.object[error.start]:02X}"
    name = encoding.removesuffix("-sig").upper() if encoding.startswith("utf") else encoding
    remedy = form.setting("encoding: latin-1", "convert the file to UTF-8")
    again = f"{remedy} or the file's true encoding" if form.key else remedy
    return InputError(f"file '{form.name}' line {line}: {what} is not {name}; {again}.")


def unreadable(name: str, kind: str, error: Exception) -> InputError:
    """The error for a file that cannot be read, or whose content does not match its file type."""
    if isinstance(error, OSError) and error.strerror:
        return InputError(f"file '{name}' cannot be read ({error.strerror}); check the file and its permissions.")
    return InputError(f"file '{name}' is not readable as {kind} ({first_line(error)}); fix or replace it.")


def first_line(error: Exception) -> str:
    """The first line of an error's text, or its type."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
