"""Files of tensors: any shapes and types come back, in any ranges of rows; the safetensors package reads the same."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from distrec.data.storage import open_folder
from distrec.training import tensor_file
from distrec.training.tensor_file import read_rows, stored_tensors, write_tensors

DTYPES = list(tensor_file._DTYPES.values())


def some_tensors(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    shapes = [(), (0,), (0, 4), (1,), (7,), (5, 3), (1000, 17), (3, 2, 2)]
    return {
        f"t{number} {shape}": (torch.rand(shape) * 200 - 100).to(dtype)
        for number, (shape, dtype) in enumerate((shape, dtype) for shape in shapes for dtype in DTYPES)
    }


@pytest.mark.parametrize("seed", range(3))
def test_what_is_written_is_read_back(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_file, "_PIECE", [100, 4096, 16 << 20][seed])  # pieces within rows, and of several rows
    folder, tensors = open_folder(str(tmp_path)), some_tensors(seed)
    first_rows = {name: 10 * number for number, name in enumerate(tensors) if number % 2}
    size, digest = write_tensors(folder, "a.safetensors", tensors, first_rows)
    data = (tmp_path / "a.safetensors").read_bytes()
    assert (size, digest) == (len(data), hashlib.sha256(data).digest())
    stored = stored_tensors(folder, "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert set(file.keys()) == set(tensors)
        for name, tensor in tensors.items():
            assert torch.equal(file.get_tensor(name), tensor)
            assert (stored[name].shape, stored[name].first_row) == (tuple(tensor.shape), first_rows.get(name, 0))
            rows = len(tensor) if tensor.dim() else 1
            for low, high in {(0, rows), (rows // 3, rows), (rows // 3, max(rows // 3, rows - 1))}:
                out = torch.zeros_like(tensor[low:high] if tensor.dim() else tensor)
                read_rows(folder, "a.safetensors", stored[name], low, out)
                assert torch.equal(out, tensor[low:high] if tensor.dim() else tensor), (name, low, high)


def test_a_view_of_a_larger_tensor_is_written_and_filled_in_place(tmp_path: Path) -> None:
    folder, whole = open_folder(str(tmp_path)), torch.arange(24.0).view(4, 6)
    view = whole[:, 1:4]
    write_tensors(folder, "a.safetensors", {"view": view}, {})
    copy = view.clone()
    view.zero_()
    read_rows(folder, "a.safetensors", stored_tensors(folder, "a.safetensors")["view"], 0, view)
    assert torch.equal(whole[:, 1:4], copy)


@pytest.mark.parametrize("data", [b"", b"\0" * 8, b"\xff" * 64, b"PK\3\4" * 50, (9).to_bytes(8, "little") + b"[" * 9])
def test_another_file_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="header"):
        stored_tensors(open_folder(str(tmp_path)), "a.safetensors")
