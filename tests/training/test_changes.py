"""Settings that change while a run trains: `changes`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from distrec.config.run import RunConfig, load_run
from distrec.config.tree import decode, set_keys
from distrec.data.dataset import Dataset
from distrec.errors import InputError
from distrec.methods.registry import METHODS, build_method, changeable, resolve
from distrec.parallel.world import World
from distrec.training.launch import train
from distrec.training.loop import fit
from distrec.training.run_folder import RunFolder
from tests.distributed import run_workers
from tests.methods import beside
from tests.training import small

TRAINED = [name for name, kind in METHODS.items() if kind.trainable]
CASES = [(name, f"method.{key}") for name in TRAINED for key in METHODS[name].changeable]
CASES += [(name, "optimizer.lr") for name in TRAINED]


def run(path: Path, data: str, name: str, changes: list[dict[str, Any]], **sections: Any) -> Path:
    train(small.write_config(path / "run.yaml", data, path, name, changes=changes, **sections))
    return path / "run"


def other(config: RunConfig, key: str) -> float:
    """Another value for a key than the config has."""
    section, _, name = key.partition(".")
    tree: dict[str, Any] = config.model_dump()
    value = tree[section][name]
    for candidate in (value * 30, value * 1.7 + 0.1, 0.9, value + 1):
        with suppress(InputError):  # the setting has bounds
            if candidate != value:
                resolve(decode(RunConfig, set_keys(tree, {key: candidate}, "test")))
                return float(candidate)
    raise AssertionError(f"no other value of '{key}' than {value} is allowed")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small.write_small(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory: pytest.TempPathFactory, data: str) -> Callable[..., Path]:
    """A method's run without changes; each is trained once."""
    made: dict[str, Path] = {}

    def of(name: str, **sections: Any) -> Path:
        key = repr((name, sections))
        if key not in made:
            made[key] = run(tmp_path_factory.mktemp("plain"), data, name, [], **sections)
        return made[key]

    return of


@pytest.mark.parametrize("method", TRAINED)
def test_changes_to_the_same_values_leave_every_bit(tmp_path: Path, data: str, method: str) -> None:
    same = resolve(load_run(small.write_config(tmp_path / "c.yaml", data, tmp_path, method)))
    tree: dict[str, Any] = same.model_dump()
    values = {key: tree[key.split(".")[0]][key.split(".")[1]] for key in changeable(same)}
    plain = run(tmp_path / "plain", data, method, [])
    changed = run(tmp_path / "changed", data, method, [{"epoch": 1, "values": values}, {"epoch": 2, "values": values}])
    small.same_losses(plain, changed, rtol=0)
    want, got = small.tensors(plain), small.tensors(changed)
    assert want.keys() == got.keys()
    assert all(torch.equal(want[name], got[name]) for name in want)
    assert small.read(plain, "summary.json")["valid"] == small.read(changed, "summary.json")["valid"]


@pytest.mark.parametrize(("method", "key"), CASES)
def test_a_change_acts_from_its_epoch_on_and_not_before(
    tmp_path: Path, data: str, unchanged: Callable[..., Path], method: str, key: str
) -> None:
    """Some settings matter only in a variant, such as MENTOR's dropout."""
    for variant in (None, *beside.small(method).variants):
        sections = {"train": {"epochs": 2}, "method": beside.settings(method, variant)}
        plain = unchanged(method, **sections)
        config = resolve(load_run(plain.parent / "run.yaml"))
        changes = [{"epoch": 1, "values": {key: other(config, key)}}]
        changed = run(tmp_path / str(variant), data, method, changes, **sections)
        one, two = small.metrics(plain), small.metrics(changed)
        assert one[0]["loss"] == two[0]["loss"]
        assert one[0]["valid"] == two[0]["valid"]
        want, got = small.tensors(plain), small.tensors(changed)
        if any(not torch.equal(want[name], got[name]) for name in want):
            return
    raise AssertionError(f"'{key}' never matters")


@pytest.mark.parametrize(("method", "key"), [case for case in CASES if case[1].startswith("method.")])
def test_a_weight_of_zero_changes_no_table_and_no_module(tmp_path: Path, data: str, method: str, key: str) -> None:
    base = resolve(load_run(small.write_config(tmp_path / "run.yaml", data, tmp_path, method)))
    shapes = []
    for value in (other(base, key), 0.0):
        try:
            config = resolve(decode(RunConfig, set_keys(base.model_dump(), {key: value}, "test")))
        except InputError:  # the setting must not be zero
            assert value == 0
            continue
        built = build_method(config, Dataset.open(data))
        module = built.dense() or torch.nn.Identity()
        tables = [(table.name, table.side, table.dim) for table in built.tables()]
        shapes.append((tables, {name: value.shape for name, value in module.state_dict().items()}))
    assert shapes[0] == shapes[-1]


def test_odmt_goes_on_without_distillation(tmp_path: Path, data: str) -> None:
    """A term that is left out from a change on."""
    changes = [{"epoch": 1, "values": {"method.alpha": 0.0, "method.dropout": 0.0}}]
    assert len(small.metrics(run(tmp_path, data, "odmt", changes, train={"epochs": 2}))) == 2


def test_patience_counts_anew_from_a_change(tmp_path: Path, data: str) -> None:
    still = {"optimizer": {"lr": 1e-30}, "train": {"epochs": 12, "patience": 3}}
    assert len(small.metrics(run(tmp_path / "plain", data, "bprmf", [], **still))) == 4
    for epoch in (3, 4):  # before patience runs out, and just then
        changes = [{"epoch": epoch, "values": {"method.reg": 0.5}}]
        assert len(small.metrics(run(tmp_path / str(epoch), data, "bprmf", changes, **still))) == epoch + 3
    changes = [{"epoch": 5, "values": {"method.reg": 0.5}}]
    assert len(small.metrics(run(tmp_path / "late", data, "bprmf", changes, **still))) == 4


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_learning_rates_by_changes_are_those_of_a_decay(tmp_path: Path, data: str, name: str) -> None:
    decayed = run(
        tmp_path / "decay",
        data,
        "lightgcn",
        [],
        optimizer={"name": name, "lr": 0.08, "lr_decay": {"factor": 0.5, "epochs": 1.0}},
    )
    changes = [{"epoch": epoch, "values": {"optimizer.lr": 0.08 * 0.5**epoch}} for epoch in (1, 2)]
    changed = run(tmp_path / "changes", data, "lightgcn", changes, optimizer={"name": name, "lr": 0.08})
    assert [epoch["lr"] for epoch in small.metrics(changed)] == [0.08, 0.04, 0.02]
    want, got = small.tensors(decayed), small.tensors(changed)
    assert all(torch.equal(want[name], got[name]) for name in want)


@pytest.mark.parametrize("place", [(0, 3), (1, 0), (1, 4), (2, 5)])
def test_a_run_with_changes_goes_on_where_it_died(tmp_path: Path, data: str, place: tuple[int, int]) -> None:
    changes = [{"epoch": 1, "values": {"optimizer.lr": 0.05}}, {"epoch": 2, "values": {"method.reg_weight": 0.1}}]
    sections = {"train": {"checkpoint_every": 2}}
    whole = run(tmp_path / "whole", data, "alignrec", changes, **sections)
    with small.crash_at(place), pytest.raises(RuntimeError, match="crash"):
        run(tmp_path / "torn", data, "alignrec", changes, **sections)
    torn = run(tmp_path / "torn", data, "alignrec", changes, **sections)
    want, got = small.tensors(whole), small.tensors(torn)
    assert all(torch.equal(want[name], got[name]) for name in want)
    small.same_losses(whole, torn, rtol=0)


def test_changes_ahead_may_be_set_and_those_behind_may_not(tmp_path: Path, data: str) -> None:
    first = [{"epoch": 1, "values": {"optimizer.lr": 0.05}}]
    run(tmp_path, data, "bprmf", first, train={"epochs": 2})
    longer = run(tmp_path, data, "bprmf", [*first, {"epoch": 2, "values": {"method.reg": 0.1}}], train={"epochs": 4})
    straight = run(
        tmp_path / "straight", data, "bprmf", [*first, {"epoch": 2, "values": {"method.reg": 0.1}}], train={"epochs": 4}
    )
    want, got = small.tensors(straight), small.tensors(longer)
    assert all(torch.equal(want[name], got[name]) for name in want)
    for wrong in ([], [{"epoch": 1, "values": {"optimizer.lr": 0.04}}], first):
        with pytest.raises(InputError, match="has trained 4 epochs with changes"):
            run(tmp_path, data, "bprmf", wrong, train={"epochs": 5})


@pytest.mark.parametrize(
    ("method", "changes", "told"),
    [
        ("alignrec", [{"epoch": 1, "values": {"method.knn_k": 5}}], "method.knn_k' after epoch 1, which cannot change"),
        ("alignrec", [{"epoch": 1, "values": {"method.sim_wieght": 5.0}}], "did you mean 'method.sim_weight'"),
        ("alignrec", [{"epoch": 1, "values": {"optimizer.lr": -1.0}}], "'optimizer.lr' is -1.0"),
        ("alignrec", [{"epoch": 2, "values": {"optimizer.lr": 1.0}}] * 2, "ascending epochs"),
        ("alignrec", [{"epoch": 0, "values": {"optimizer.lr": 1.0}}], "changes.0.epoch"),
        ("alignrec", [{"epoch": 1, "values": {}}], "changes.0.values"),
        ("alignrec", [{"epoch": 7, "values": {"optimizer.lr": -1.0}}], "'optimizer.lr' is -1.0"),  # past the end
        ("popularity", [{"epoch": 1, "values": {"optimizer.lr": 1.0}}], "popularity does not train"),
    ],
)  # fmt: skip
def test_refused(tmp_path: Path, data: str, method: str, changes: list[dict[str, Any]], told: str) -> None:
    with pytest.raises(InputError, match=told):
        run(tmp_path, data, method, changes)


def train_here(config: RunConfig) -> None:
    fit(World.current(), Dataset.open(config.data), config)


@pytest.mark.multiprocess
def test_two_workers_train_the_same_schedule(tmp_path: Path, data: str) -> None:
    changes = [
        {"epoch": 1, "values": {"optimizer.lr": 0.004, "method.cl_loss": 0.1}},
        {"epoch": 2, "values": {"method.sim_weight": 0.5}},
    ]
    one = run(tmp_path / "one", data, "alignrec", changes)
    path = small.write_config(tmp_path / "two" / "run.yaml", data, tmp_path / "two", "alignrec", changes=changes)
    config, two = resolve(load_run(path)), tmp_path / "two" / "run"
    RunFolder.of(config).open_attempt(config, Dataset.open(data).hash)
    run_workers(train_here, 2, config)
    assert [epoch["workers"] for epoch in small.metrics(two)] == [2, 2, 2]
    small.same_losses(one, two, rtol=1e-4)
    steps = 3 * -(-small.metrics(one)[0]["ledger"]["expected"] // 64)
    small.same_tensors(small.tensors(one), small.tensors(two), 0.004, steps)
