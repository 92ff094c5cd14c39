"""Kept neighbour lists have the bits of computed lists, at any number of workers and whatever the folder holds."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from distrec.data.dataset import Dataset
from distrec.data.storage import open_folder
from distrec.graph import cache
from distrec.graph.cache import cached_neighbours
from distrec.graph.knn import Neighbours, cosine_neighbours
from distrec.methods.workspace import Workspace
from distrec.parallel.partition import Partition
from distrec.parallel.world import World
from tests.distributed import run_workers
from tests.graph.neighbour_lists import unit_vectors
from tests.methods.bare import method_of
from tests.training.random_data import write_random

ITEMS, ROWS = 40, 7
VECTORS = unit_vectors(ITEMS, 6, 0, equal=0.3, zero=2)
METHODS: list[dict[str, Any]] = [
    {"name": "alignrec", "dim": 4, "knn_k": 5},
    {"name": "stair", "dim": 4, "neighbours": [4, 2]},
    {"name": "mentor", "dim": 4, "knn_k": 3},
]


def same(one: Neighbours, other: Neighbours) -> bool:
    """Check that bits and types are equal."""
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(one, other, strict=True))


def never(*_: Any, **__: Any) -> Neighbours:
    raise AssertionError("computed what is kept")


def lists(folder: Path | str, k: int = 5, include_self: bool = True, **made_of: Any) -> Neighbours:
    world = World.current()
    partition = Partition(ITEMS, world.size)
    block = VECTORS[partition.start(world.rank) : partition.stop(world.rank)]
    return cached_neighbours(open_folder(str(folder)), world, partition, made_of, block, k, include_self)


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.fixture(autouse=True)
def several_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_ROWS", ROWS)


@pytest.mark.parametrize(("k", "include_self"), [(1, True), (5, False), (ITEMS, True), (ITEMS + 3, False)])
def test_what_is_kept_is_what_was_computed(tmp_path: Path, monkeypatch, k: int, include_self: bool):
    wanted = cosine_neighbours(World(0, 1), Partition(ITEMS, 1), VECTORS, k, include_self)
    assert same(lists(tmp_path, k, include_self), wanted)
    monkeypatch.setattr(cache, "cosine_neighbours", never)
    assert same(lists(tmp_path, k, include_self), wanted)
    assert len(files(tmp_path)) == -(-ITEMS // ROWS)


def test_every_setting_is_part_of_the_key(tmp_path: Path):
    settings: list[dict[str, Any]] = [
        {}, {"k": 4}, {"include_self": False}, {"data": "a"}, {"data": "b"}, {"fill": "mean"}, {"fill": "zeros"},
        {"features": ["text", "image"]}, {"features": ["image", "text"]}, {"features": ["text"]},
    ]  # fmt: skip
    for count, setting in enumerate(settings, 1):
        lists(tmp_path, **setting)
        assert len(list(tmp_path.iterdir())) == count, setting
    lists(tmp_path, fill="zeros")
    assert len(list(tmp_path.iterdir())) == len(settings)


def damages(path: Path) -> dict[str, bytes | None]:
    """File contents that differ from what was written; None means that there is no file."""
    data = path.read_bytes()
    flipped = bytearray(data)
    flipped[-3] ^= 16
    other = path.with_name("0" if path.name != "0" else "1").read_bytes()
    return {
        "torn": data[: len(data) // 2], "empty": b"", "longer": data + b"0", "one bit": bytes(flipped), "gone": None,
        "only a checksum": data[:64], "a checksum of nothing": cache.sha256(b"").encode(), "of other items": other,
    }  # fmt: skip


def test_what_is_damaged_is_computed_and_written_again(tmp_path: Path):
    wanted = lists(tmp_path)
    whole = {path: path.read_bytes() for path in files(tmp_path)}
    last = files(tmp_path)[-1]
    for name, content in damages(last).items():
        if content is None:
            last.unlink()
        else:
            last.write_bytes(content)
        assert same(lists(tmp_path), wanted), name
        assert {path: path.read_bytes() for path in files(tmp_path)} == whole, name


def test_a_folder_that_cannot_be_written_costs_time_only(tmp_path: Path):
    (tmp_path / "taken").write_text("")
    assert same(lists(tmp_path / "taken"), lists(tmp_path / "fine"))


def test_an_object_store_keeps_lists_too(s3: str, monkeypatch):
    folder = f"{s3}/graphs"
    wanted = lists(folder)
    with monkeypatch.context() as patch:
        patch.setattr(cache, "cosine_neighbours", never)
        assert same(lists(folder), wanted)
    (key,) = open_folder(folder).names()
    open_folder(folder).write_bytes(b"damage", key, "2")
    assert same(lists(folder), wanted)
    assert open_folder(folder).read_bytes(key, "2") != b"damage"


def graphs_of(path: str, folder: str | None) -> list[torch.Tensor]:
    """My rows of every method's item graph, as a dense matrix."""
    world, data, out = World.current(), Dataset.open(path), []
    for settings in METHODS:
        method: Any = method_of(data, **settings)
        method.build(space := Workspace(world, data, data.interactions("train"), folder))
        identity = space.my_rows("item", torch.eye(data.items))
        out.append(method.item_item.times_values(identity))
    return out


def shared(path: str, folder: str, told: bool) -> list[torch.Tensor]:
    """My rows of lists from many files, and of graphs without and with kept lists, which must exist if `told`."""
    cache._ROWS, before, compute = ROWS, cache._ROWS, cache.cosine_neighbours
    try:
        if told:
            cache.cosine_neighbours = never
        return [*lists(Path(folder)), *graphs_of(path, None), *graphs_of(path, folder)]
    finally:
        cache._ROWS, cache.cosine_neighbours = before, compute


def shared_then_damaged(path: str, folder: str) -> list[torch.Tensor]:
    """`shared` with existing lists, then with one damaged file that only the last worker reads, so that all compute."""
    world = World.current()
    found = shared(path, folder, True)
    world.barrier()
    if world.rank == 0:
        for file in files(Path(folder)):
            if file.name == "5":
                file.write_bytes(b"damage")
    world.barrier()
    return found + shared(path, folder, False)


def joined(parts: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    """The rows of all workers."""
    return [torch.cat(rows) for rows in zip(*parts, strict=True)]


@pytest.mark.multiprocess
def test_any_number_of_workers_writes_and_reads(tmp_path: Path):
    data, folder = write_random(tmp_path / "data", 30, 41, 150, 1), tmp_path / "graphs"
    wrote = joined(run_workers(shared, 2, data, str(folder), False))
    written = {path: path.read_bytes() for path in files(folder)}
    assert len(written) == 6 + 5 * 6, "AlignRec has one list, STAIR and MENTOR two each"
    assert all(torch.equal(one, other) for one, other in zip(wrote[2:5], wrote[5:], strict=True))
    found = shared(data, str(folder), True)
    assert all(torch.equal(one, other) for one, other in zip(found, wrote, strict=True))
    found = joined(run_workers(shared_then_damaged, 3, data, str(folder)))
    assert all(torch.equal(one, other) for one, other in zip(found, wrote + wrote, strict=True))
    assert {path: path.read_bytes() for path in files(folder)} == written, "whole again"


def test_runs_share_lists_and_stay_themselves(tmp_path: Path, capsys, monkeypatch):
    from distrec.cli import main
    from tests.training import small

    data, path = small.write_small(tmp_path / "data"), tmp_path / "run.yaml"
    config = small.write_config(path, data, tmp_path / "runs", "alignrec")
    monkeypatch.chdir(tmp_path)
    assert main(["train", config, "run.name=alone", "train.epochs=1"]) == 0
    assert main(["train", config, "train.epochs=1", "run.graphs=graphs"]) == 0
    assert len([name for name in os.listdir(tmp_path / "graphs") if name != "about.json"]) == 1
    monkeypatch.setattr(cache, "cosine_neighbours", never)
    assert main(["train", config, "train.epochs=1", "run.graphs=graphs", "run.name=second"]) == 0
    assert main(["evaluate", "runs/second"]) == 0
    for name in ("run", "second"):
        assert small.metrics(tmp_path / "runs" / name)[0]["loss"] == small.metrics(tmp_path / "runs/alone")[0]["loss"]
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert main(["train", config, "train.epochs=2"]) == 0, "where graphs are kept is no part of a run's identity"
    (tmp_path / "taken").write_text("")
    assert main(["train", config, "run.graphs=taken/graphs"]) == 2
    assert "key 'run.graphs' is '" in capsys.readouterr().err
