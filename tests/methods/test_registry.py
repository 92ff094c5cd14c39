import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from distrec.data.dataset import Dataset
from distrec.errors import InputError
from distrec.methods.registry import METHODS, build_method, method_config, resolve
from tests.methods import beside
from tests.methods.configs import run
from tests.training.small import write_small


@pytest.mark.parametrize("name", METHODS)
def test_every_method_resolves_to_a_config_that_resolves_to_itself(name: str):
    resolved = resolve(run({"name": name}))
    assert set(resolved.method) == set(METHODS[name].Config.model_fields)
    assert resolve(resolved) == resolved


@pytest.mark.parametrize(
    ("method", "told"),
    [
        ({}, "key 'method.name' is missing; name one of alignrec, mentor"),
        ({"name": "lightgnc"}, "key 'method.name' is 'lightgnc', an unknown method; did you mean 'lightgcn'?"),
        ({"name": 3}, "key 'method.name' is 3, an unknown method"),
        ({"name": "lightgcn", "layer": 2}, "unknown key 'method.layer'; did you mean 'layers'?"),
        ({"name": "lightgcn", "dim": 0}, "key 'method.dim' is 0 but must be greater than or equal to 1"),
        ({"name": "alignrec", "fill": "median"}, "key 'method.fill' is 'median'"),
        ({"name": "alignrec", "cca_temperature": 0.01}, "key 'method.cca_temperature' is 0.01"),
        ({"name": "popularity", "dim": 4}, "unknown key 'method.dim'"),
    ],
)
def test_wrong_settings_are_refused_by_key(method: dict[str, Any], told: str):
    with pytest.raises(InputError) as error:
        method_config(method)
    assert str(error.value).startswith(told)


@pytest.mark.parametrize("name", ["alignrec", "lightgcn", "popularity"])
def test_sparse_tables_are_refused_where_whole_tables_are_used(name: str):
    with pytest.raises(InputError, match=f"'optimizer.tables' is 'sparse' but {name} works on whole tables"):
        resolve(run({"name": name}, optimizer={"tables": "sparse"}))


def test_sparse_tables_refuse_weight_decay_and_odd_widths(tmp_path: Path):
    with pytest.raises(InputError, match=r"'optimizer.weight_decay' must be 0"):
        resolve(run({"name": "bprmf"}, optimizer={"tables": "sparse", "weight_decay": 0.1}))
    data = Dataset.open(write_small(tmp_path))
    config = resolve(run({"name": "bprmf", "dim": 6}, optimizer={"tables": "sparse"}))
    with pytest.raises(
        InputError, match=r"table 'user' is 6 wide but 'optimizer\.tables: sparse' needs a multiple of 4"
    ):
        build_method(config, data)
    assert [table.dim for table in build_method(resolve(run({"name": "bprmf", "dim": 6})), data).tables()] == [6, 6]


def test_alignrec_asks_for_features_that_exist(tmp_path: Path):
    data = Dataset.open(write_small(tmp_path))
    with pytest.raises(InputError, match="has no feature 'img'"):
        build_method(resolve(run({"name": "alignrec", "features": ["text", "img"]})), data)
    with pytest.raises(InputError, match=r"key 'method.features' is empty but alignrec needs at least one"):
        build_method(resolve(run({"name": "alignrec", "features": []})), data)
    method = build_method(resolve(run({"name": "alignrec", "features": ["image", "text"], "dim": 4})), data)
    assert [(table.name, table.side, table.dim) for table in method.tables()] == [
        ("user", "user", 4), ("item", "item", 4), ("content", "item", 13),
    ]  # fmt: skip
    assert method.degradations() == ["1 of 37 items lack feature 'text', filled with the mean of the others"]


@pytest.mark.parametrize(("fill", "rule"), [("mean", "the mean of the others"), ("zeros", "zeros")])
@pytest.mark.parametrize("name", [name for name, kind in METHODS.items() if "fill" in kind.Config.model_fields])
def test_every_method_that_fills_missing_features_says_so(tmp_path: Path, name: str, fill: str, rule: str):
    data = Dataset.open(write_small(tmp_path))
    found = build_method(resolve(run(beside.settings(name) | {"fill": fill})), data).degradations()
    assert f"1 of 37 items lack feature 'text', filled with {rule}" in found
    assert build_method(resolve(run({"name": "lightgcn"})), data).degradations() == []


@pytest.mark.parametrize("name", METHODS)
def test_no_method_speaks_of_what_a_workspace_hides(name: str):
    source = inspect.getsource(inspect.getmodule(METHODS[name]))
    words = r"partition|gathered\(|GatherExchange|\bworld\b|max_\(|mine\.start|zero_stage|ZeRO"
    assert re.findall(rf"{words}|distrec\.parallel\.(?!linear)", source) == []
