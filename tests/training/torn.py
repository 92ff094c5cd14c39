"""Ways in which a checkpoint can be damaged or torn."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def tensor_file(folder: Path) -> Path:
    return next(folder.glob("rows-*.safetensors"))


def flip(path: Path, place: int, bit: int = 0) -> None:
    """Flip one bit of the byte at `place` of a file."""
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)


TEARS: dict[str, Callable[[Path], Any]] = {
    "tensor file cut short": lambda folder: os.truncate(tensor_file(folder), tensor_file(folder).stat().st_size // 2),
    "tensor file missing": lambda folder: tensor_file(folder).unlink(),
    "bit flipped": lambda folder: flip(tensor_file(folder), -1),
    "no dense weights": lambda folder: next(folder.glob("whole-*")).unlink(),
    "no state.json": lambda folder: (folder / "state.json").unlink(),
    "no complete.json": lambda folder: (folder / "complete.json").unlink(),
    "half a complete.json": lambda folder: os.truncate(folder / "complete.json", 20),
    "empty complete.json": lambda folder: (folder / "complete.json").write_text("{}"),
    "nothing inside": lambda folder: [path.unlink() for path in folder.iterdir()],
}
