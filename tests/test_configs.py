"""Every shipped config is read by the code that will read it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from distrec.cli import main
from distrec.config import decode, load_run
from distrec.config.run import RunConfig
from distrec.config.tree import apply_overrides, load_file
from distrec.data.importers import choose_importer
from distrec.data.prepare import DataConfig
from distrec.errors import InputError
from distrec.methods.registry import METHODS, resolve
from distrec.tuning.space import load_spaces

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SPACES = sorted(CONFIGS.glob("*/search.yaml"))
RUNS = sorted(path for path in CONFIGS.glob("*/*.yaml") if path.parent.name != "data" and path not in SPACES)
DATA = sorted((CONFIGS / "data").glob("*.yaml"))
CONTENT_FREE = {"lightgcn", "bprmf", "popularity", "sasrec"}
SEQUENTIAL = {"sasrec", "odmt", "bivrec"}  # their datasets hold out users' last items


def label(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


@pytest.mark.parametrize("path", RUNS, ids=label)
def test_run_config_resolves(path: Path) -> None:
    config = resolve(load_run(path))
    assert config.method["name"] == path.parent.name
    assert config.run.name == f"{path.parent.name}-{path.stem}"
    assert Path(config.data).parts[0] in ("data", "build")  # places inside the checkout, never of a machine
    assert resolve(config) == config


@pytest.mark.parametrize("path", DATA, ids=label)
def test_data_config_decodes(path: Path) -> None:
    settings = decode(DataConfig, load_file(path))
    choose_importer(settings.importer)
    assert settings.name == path.stem


def test_every_method_ships_the_named_datasets() -> None:
    shipped = {label(path) for path in RUNS}
    datasets = {path.stem for path in DATA}
    for method in METHODS.keys() - {"bprmf"}:
        if method in SEQUENTIAL:
            named = {"movielens-next"} | ({"baby-next"} if method in CONTENT_FREE else set())
        else:
            named = {"movielens", "movielens-benchmark"} | ({"baby"} if method in CONTENT_FREE else set())
        assert {f"{method}/{name}" for name in named | {"demo"}} <= shipped
    known = datasets | {"baby-synthetic"}  # which `distrec synth` writes prepared
    assert all(path.stem in known or path.stem.rpartition("-")[0] in known for path in RUNS)


@pytest.mark.parametrize("path", SPACES, ids=label)
def test_every_value_of_a_search_space_resolves(path: Path) -> None:
    tree = load_file(path.parent / "demo.yaml")
    for name, space in load_spaces(path).items():
        for key, values in space.items():
            for value in values:
                section, _, field = key.partition(".")
                found = resolve(decode(RunConfig, apply_overrides(tree, [f"{key}={value}"]))).model_dump()[section][
                    field
                ]
                assert found == value, f"{name}: {key}"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{}", "holds no space"),
        ("published: {}", "space 'published' has no keys"),
        ("published: {optimizer.lr: 1e-3}", "key 'published: optimizer.lr' is 0.001; give a list of different values"),
        ("published: {optimizer.lr: []}", "give a list of different values"),
        ("published: {optimizer.lr: [1e-3, 0.001]}", "give a list of different values"),
    ],
)
def test_a_wrong_search_space_is_refused(text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "search.yaml").write_text(text)
    with pytest.raises(InputError, match=told):
        load_spaces(tmp_path / "search.yaml")


@pytest.mark.parametrize("path", RUNS, ids=label)
def test_print_config_shows_what_would_be_read_again(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(path), "--print-config", "train.seed=7"]) == 0
    shown = tmp_path / "shown.yaml"
    shown.write_text(capsys.readouterr().out)
    assert resolve(load_run(shown)) == resolve(load_run(path, ["train.seed=7"]))


@pytest.mark.parametrize(("text", "value"), [("1e-3", 1e-3), ("2E+1", 20.0), (".5", 0.5), ("1.", 1.0), ("-0", None)])
def test_numbers_in_files_and_overrides_are_numbers(tmp_path: Path, text: str, value: float | None) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"data: d\nrun: {{name: r}}\nmethod: {{name: lightgcn}}\noptimizer: {{weight_decay: {text}}}\n")
    from_file, from_override = load_run(path), load_run(path, [f"optimizer.weight_decay={text}"])
    assert from_file == from_override
    assert from_file.optimizer.weight_decay == (0 if value is None else value)


def test_print_config_prints_plain_yaml(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(RUNS[0]), "train.epochs=4", "--print-config", "train.seed=3"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["train"]["epochs"], shown["train"]["seed"]) == (4, 3)  # overrides on either side of the option
    assert shown["optimizer"]["eps"] == 1e-8
