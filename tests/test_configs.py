"""Every shipped config can be read by the code that it is written for."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from distrec.cli import main
from distrec.config import Section, commented, decode, load_run
from distrec.config.run import OptimizerSection, RunConfig, TrainSection
from distrec.config.tree import apply_overrides, load_file
from distrec.data.importers import choose_importer
from distrec.data.prepare import DataConfig
from distrec.methods.base import Method
from distrec.methods.registry import METHODS, resolve
from distrec.tuning.entries import resolve_entries
from distrec.tuning.space import Range, load_spaces
from distrec.tuning.sweep import (
    AshaSection,
    BudgetSection,
    EntrySection,
    PbtSection,
    ResourceSection,
    SweepConfig,
    load_sweep,
)

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SPACES = sorted(CONFIGS.glob("*/search.yaml"))
SWEEPS = sorted((CONFIGS / "sweeps").glob("*.yaml"))
RUNS = sorted(
    path for path in CONFIGS.glob("*/*.yaml") if path.parent.name not in ("data", "sweeps") and path not in SPACES
)
DATA = sorted((CONFIGS / "data").glob("*.yaml"))
CONTENT_FREE = {name for name, kind in METHODS.items() if kind.features is Method.features}
SEQUENTIAL = {name for name, kind in METHODS.items() if kind.reads_histories}  # their data hold out users' last items


def label(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


@pytest.mark.parametrize("path", RUNS, ids=label)
def test_run_config_resolves(path: Path) -> None:
    config = resolve(load_run(path))
    assert config.method["name"] == path.parent.name
    assert config.run.name == f"{path.parent.name}-{path.stem}"
    assert Path(config.data).parts[0] in ("data", "build")  # relative to the checkout, on any machine
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
    known = datasets | {"baby-synthetic"}  # `distrec synth` writes it, already prepared
    assert all(path.stem in known or path.stem.rpartition("-")[0] in known for path in RUNS)


@pytest.mark.parametrize("path", SPACES, ids=label)
def test_every_value_of_a_search_space_resolves(path: Path) -> None:
    tree = load_file(path.parent / "demo.yaml")
    for name, space in load_spaces(path).items():
        for key, candidates in space.items():
            for value in [candidates.low, candidates.high] if isinstance(candidates, Range) else candidates:
                section, _, field = key.partition(".")
                found = resolve(decode(RunConfig, apply_overrides(tree, [f"{key}={value}"]))).model_dump()[section][
                    field
                ]
                assert found == value, f"{name}: {key}"


@pytest.mark.parametrize("path", SWEEPS, ids=label)
def test_sweep_resolves(path: Path) -> None:
    sweep = load_sweep(path)
    assert sweep.run.name == path.stem
    entries = resolve_entries(sweep)
    for entry in entries.values():
        assert entry.base.data == sweep.data
        assert entry.base.train.metric == sweep.metric
    if path.stem != "baby-id-only":
        assert {entry.base.method["name"] for entry in entries.values()} == METHODS.keys()
    assert Path(sweep.data).parts[0] in ("data", "build")


def printed(verb: str, path: Path, capsys: pytest.CaptureFixture[str], folder: Path) -> tuple[str, Path]:
    """The output of --print-config for a config, and a file that contains it."""
    assert main([verb, str(path), "--print-config", "run.name=again"]) == 0
    shown, file = capsys.readouterr().out, folder / "shown.yaml"
    file.write_text(shown)
    return shown, file


def complaints(shown: str, *kinds: type[Section]) -> list[str]:
    """The fields of `kinds` that a config does not describe in comments, and its lines of more than 120 columns."""
    words = " ".join(line.rpartition("# ")[2] for line in shown.splitlines())
    fields = [(kind, name, field.description) for kind in kinds for name, field in kind.model_fields.items()]
    found = [f"{kind.__qualname__}.{name} is not described" for kind, name, text in fields if text not in words]
    return found + [f"longer than 120 columns: {line}" for line in shown.splitlines() if len(line) > 120]


@pytest.mark.parametrize("path", RUNS, ids=label)
def test_a_printed_run_config_reads_back_as_the_same(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown, file = printed("train", path, capsys, tmp_path)
    assert load_run(file) == resolve(load_run(path, ["run.name=again"]))
    assert complaints(shown, RunConfig, TrainSection, OptimizerSection, METHODS[path.parent.name].Config) == []


@pytest.mark.parametrize("path", SWEEPS, ids=label)
def test_a_printed_sweep_config_reads_back_as_the_same(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown, file = printed("tune", path, capsys, tmp_path)
    assert load_sweep(file) == load_sweep(path, ["run.name=again"])
    kinds = SweepConfig, EntrySection, BudgetSection, AshaSection, PbtSection, ResourceSection
    assert complaints(shown, *kinds) == []


@pytest.mark.parametrize("path", DATA, ids=label)
def test_a_commented_data_config_reads_back_as_the_same(path: Path, tmp_path: Path) -> None:
    settings = decode(DataConfig, load_file(path))
    importer, section = choose_importer(settings.importer)
    settings = settings.model_copy(update={"importer": section.model_dump()})
    file = tmp_path / "shown.yaml"
    file.write_text(commented(settings, importer=importer.config))
    assert decode(DataConfig, load_file(file)) == settings
    assert complaints(file.read_text(), DataConfig, importer.config) == []


def test_a_sweep_that_could_not_start_is_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", str(SWEEPS[0]), "--print-config", "metric=recall@7"]) == 2
    assert "'evaluate.ks'" in capsys.readouterr().err


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
    assert (shown["train"]["epochs"], shown["train"]["seed"]) == (4, 3)  # overrides before and after the option
    assert shown["optimizer"]["eps"] == 1e-8
