"""A run that cannot fit into memory is refused before anything is allocated, and the estimate is a lower bound."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distrec import runtime
from distrec.data.dataset import Dataset
from distrec.errors import InputError
from distrec.methods.registry import METHODS, build_method
from distrec.training.size import check_host, check_memory, least_bytes, worker_parts
from tests.methods import bare, beside

USERS, ITEMS, WIDTH, TOKENS = 12, 14, 6, 3


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    rng = np.random.default_rng(0)
    features = {name: rng.normal(size=(ITEMS, WIDTH)) for name in ("text", "image")}
    tokens = {f"{name}-tokens": rng.normal(size=(ITEMS, TOKENS, WIDTH)) for name in ("text", "image")}
    train = [(user, (user + shift) % ITEMS) for user in range(USERS) for shift in range(6)]
    return Dataset.open(bare.write(tmp_path_factory.mktemp("data"), USERS, ITEMS, train, features, tokens=tokens))


@pytest.mark.parametrize("name", METHODS)
def test_the_parts_of_every_method_are_counted(name: str, data: Dataset):
    config = bare.run_config(beside.settings(name), train={"workers": 3})
    method = build_method(config, data)
    parts = least_bytes(config, data, method, 3, 3)
    dense = method.dense()
    values = sum(parameter.numel() for parameter in dense.parameters()) if dense is not None else 0
    rows = {"user": USERS, "item": ITEMS}
    assert parts["tables"] == 4 * sum(rows[table.side] * table.dim for table in method.tables())
    assert parts["moments and gradients of tables"] == 3 * parts["tables"]
    assert parts["features"] == sum(
        ITEMS * WIDTH * (2 * TOKENS if "tokens" in feature else 4) for feature in method.features()
    )
    assert parts["dense module"] == 3 * 4 * 4 * values
    assert parts["interactions"] == 3 * 16 * 6 * USERS
    assert parts["order of the epoch"] == (3 * 8 * 6 * USERS if method.trainable and not method.reads_histories else 0)
    assert parts["metrics of all users"] == 3 * 8 * 5 * 4
    one = worker_parts(config, data, method, 3, values)
    assert all(3 * one[name] >= parts[name] for name in parts)  # rank 0 has the most rows
    assert sum(worker_parts(config, data, method, 4, values).values()) <= sum(one.values())
    assert config.optimizer.name == "adam"


def test_on_an_object_store_the_copy_of_a_checkpoint_counts(data: Dataset):
    parts = {}
    for storage in ("runs", "s3://bucket/runs"):
        config = bare.run_config({"name": "bprmf", "dim": 4}, run={"name": "r", "storage": storage})
        parts[storage] = least_bytes(config, data, build_method(config, data), 1, 1)
    copy = parts["s3://bucket/runs"].pop("checkpoint being written")
    assert copy == 3 * 4 * 4 * (USERS + ITEMS)
    assert parts["runs"].pop("checkpoint being written") == 0
    assert parts["runs"] == parts["s3://bucket/runs"]


def test_zero_and_sgd_take_less(data: Dataset):
    method = {"name": "sasrec", "dim": 4}
    parts = {}
    for name, dense, optimizer in (("adam", 0, "adam"), ("zero", 1, "adam"), ("sgd", 0, "sgd")):
        config = bare.run_config(
            method, train={"workers": 3}, dense={"zero_stage": dense}, optimizer={"name": optimizer}
        )
        parts[name] = least_bytes(config, data, build_method(config, data), 3, 3)
    assert parts["zero"]["dense module"] * 12 == parts["adam"]["dense module"] * 6
    assert parts["sgd"]["dense module"] * 4 == parts["adam"]["dense module"] * 2
    tables = "moments and gradients of tables"
    assert parts["sgd"]["tables"] == parts["adam"]["tables"] == parts["sgd"][tables] == parts["adam"][tables] / 3


@pytest.mark.parametrize(
    ("method", "most"),
    [
        ({"name": "sasrec", "dim": 65_536, "layers": 256, "heads": 2}, "dense module"),
        ({"name": "odmt", "dim": 65_536, "id_dim": WIDTH, "user_layers": 256}, "dense module"),
    ],
)
def test_what_cannot_fit_is_refused(method: dict[str, Any], most: str, data: Dataset, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = bare.run_config(method)
    with pytest.raises(
        InputError, match=rf"need at least [\d,.]+ GB of memory, .* most of it is for the {most}: lower"
    ):
        check_memory(config, data, build_method(config, data))
    monkeypatch.setenv("RAY_ADDRESS", "auto")  # the workers are on other machines
    check_memory(config, data, build_method(config, data))


def test_the_limit_is_the_memory_of_the_machine(data: Dataset, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = bare.run_config({"name": "bprmf"})
    method = build_method(config, data)
    needed = sum(least_bytes(config, data, method, 2, 2).values())
    monkeypatch.setattr(runtime, "total_memory", lambda: needed)
    check_memory(config, data, method)
    monkeypatch.setattr(runtime, "total_memory", lambda: needed - 1)
    with pytest.raises(InputError, match="method 'bprmf' and this dataset need at least"):
        check_memory(config, data, method)


def test_a_host_is_compared_with_its_own_workers(data: Dataset, monkeypatch: pytest.MonkeyPatch):
    config = bare.run_config({"name": "bprmf"}, train={"workers": 4})
    method = build_method(config, data)
    two, four = (sum(least_bytes(config, data, method, 4, here).values()) for here in (2, 4))
    assert two < four
    monkeypatch.setattr(runtime, "total_memory", lambda: two)
    check_host(config, data, method, 4, 2, "a")
    with pytest.raises(InputError, match=r"need at least .* but host 'b' has .* GB; most of it is for the"):
        check_host(config, data, method, 4, 4, "b")


@pytest.mark.parametrize(
    ("limits", "bytes_"),
    [
        ({}, 4 << 30),
        ({"memory.max": "max\n"}, 4 << 30),
        ({"memory.max": "1073741824\n"}, 1 << 30),
        ({"memory.limit_in_bytes": "1073741824\n"}, 1 << 30),
        ({"memory.limit_in_bytes": "9223372036854771712\n"}, 4 << 30),  # how the older kind says that there is none
    ],
)
def test_a_container_may_have_less_memory_than_its_machine(
    limits: dict[str, str], bytes_: int, monkeypatch: pytest.MonkeyPatch
):
    def read(path: Path, encoding: str) -> str:
        if path.name not in limits:
            raise FileNotFoundError(path)
        return limits[path.name]

    monkeypatch.setattr(runtime.Path, "read_text", read)
    monkeypatch.setattr(runtime.os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1 << 20}.__getitem__)
    assert runtime.total_memory() == bytes_
