"""Files of named tensors in the safetensors format: an 8-byte length, a JSON header, then the bytes of the tensors.

The `safetensors` package reads these files too. It is not used here, because it needs a whole file in memory and a
local path. These functions stream to and from any storage and hold one piece at a time.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from distrec.data.storage import Folder

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_PIECE = 16 << 20  # bytes in memory at a time
_LONGEST_HEADER = 100 << 20  # the bound of the safetensors package


@dataclass(frozen=True)
class Stored:
    """One tensor of a file.

    Attributes:
        dtype: its element type.
        shape: its shape.
        first_row: the number of its first row within a tensor that several files hold together; 0 if it is whole.
        offset: the place of its first byte in the file.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    first_row: int
    offset: int


def write_tensors(
    folder: Folder, name: str, tensors: Mapping[str, torch.Tensor], first_rows: Mapping[str, int]
) -> tuple[int, bytes]:
    """Write file `name` in `folder`; it appears when it is complete.

    Args:
        tensors: the tensors by name.
        first_rows: the number of the first row, for tensors that several files hold together.

    Returns:
        The size of the file in bytes, and its SHA-256 `[32]`.
    """
    hasher, size = hashlib.sha256(), 0
    with folder.writing(name, needed=sum(map(_bytes, tensors.values()))) as file:
        for piece in _pieces(tensors, first_rows):
            file.write(piece)
            hasher.update(piece)
            size += len(piece)
    return size, hasher.digest()


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _pieces(tensors: Mapping[str, torch.Tensor], first_rows: Mapping[str, int]) -> Iterator[bytes | memoryview]:
    header: dict[str, Any] = {"__metadata__": {"first_rows": json.dumps(dict(first_rows))}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + _bytes(tensor)
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the format asks for tensors at multiples of 8 bytes
    yield len(text).to_bytes(8, "little") + text
    for tensor in tensors.values():
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        for start in range(0, len(data), _PIECE):
            yield data[start : start + _PIECE]


def stored_tensors(folder: Folder, name: str) -> dict[str, Stored]:
    """What file `name` holds, from its header.

    Raises:
        ValueError: the file is not in this format.
    """
    length = int.from_bytes(_read(folder, name, 0, 8), "little")
    if not 2 <= length <= _LONGEST_HEADER:
        raise ValueError(f"a header of {length} bytes")
    try:
        header = json.loads(_read(folder, name, 8, 8 + length))
        first_rows = json.loads(header.pop("__metadata__")["first_rows"])
        return {
            key: Stored(
                dtype=_DTYPES[entry["dtype"]],
                shape=tuple(entry["shape"]),
                first_row=first_rows.get(key, 0),
                offset=8 + length + entry["data_offsets"][0],
            )
            for key, entry in header.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"a damaged header ({error})") from None


def read_rows(folder: Folder, name: str, stored: Stored, start: int, out: torch.Tensor) -> None:
    """Fill `out` `[rows, …]` with the rows of a stored tensor from its row `start` on; a scalar is one row."""
    if out.dim() == 0:
        out = out.reshape(1)
    row_bytes = math.prod(out.shape[1:]) * out.element_size()
    step = max(1, _PIECE // max(row_bytes, 1))
    for first in range(0, len(out), step):
        into = out[first : first + step]
        low = stored.offset + (start + first) * row_bytes
        if into.numel():
            data = bytearray(_read(folder, name, low, low + len(into) * row_bytes))
            into.copy_(torch.frombuffer(data, dtype=stored.dtype).view(into.shape))


def _read(folder: Folder, name: str, start: int, end: int) -> bytes:
    with folder.reading(name):
        return bytes(folder.fs.cat_file(folder.at(name), start=start, end=end))
