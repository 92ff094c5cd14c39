"""A verb as a job: its command, its name, and which files and places are refused."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from distrec.arguments import parse
from distrec.errors import InputError
from distrec.submission.job import _FILES, _PLACES, Job
from distrec.submission.upload import Upload
from tests.test_cli import JOBS

REPOSITORY = Path(__file__).resolve().parents[2]
TRAIN = ["train", "configs/lightgcn/demo.yaml", "data=s3://b/d", "run.storage=s3://b/r"]


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


def job(*words: str, **environment: str) -> Job:
    return Job.of(parse(words), words[1:], environment)


def refusal(*words: str, **environment: str) -> str:
    with pytest.raises(InputError) as error:
        job(*words, **environment).check_places()
    return str(error.value)


def test_every_verb_with_a_job_script_is_known() -> None:
    assert set(_PLACES) == set(JOBS)
    assert set(_FILES) <= set(JOBS)


def test_a_command_reaches_the_job_exactly() -> None:
    words = ["a b", "$HOME", "x;y", "'", '"', "`id`", "*", "\\", "é", "", "--k=v w", "a\nb", "#c", "!d", "~", "$(x)"]
    made = Job("train", words, "n")
    assert made.script == "jobs/train.py"
    shell = made.entrypoint.replace("python jobs/train.py", r"printf '%s\0'", 1)
    told = subprocess.run(["sh", "-c", shell], capture_output=True, check=True, timeout=30).stdout
    assert told.decode().split("\0")[:-1] == words


def test_names_begin_with_the_run_or_the_verb() -> None:
    assert job(*TRAIN).name == "lightgcn-demo"
    assert job(*TRAIN, "run.name=mine").name == "mine"
    assert job("check", "s3://b/d").name == "check"
    assert job("tune", "configs/sweeps/demo.yaml").name == "demo"
    assert job("demo-data", "--out", "s3://b/x").script == "jobs/demo_data.py"


def test_places_are_those_of_the_verb() -> None:
    assert job(*TRAIN, "run.graphs=/g").places == [
        ("key 'data'", "s3://b/d"), ("key 'run.storage'", "s3://b/r"), ("key 'run.graphs'", "/g"),
    ]  # fmt: skip
    assert job("evaluate", "s3://b/r1", "s3://b/r2").places == [("run", "s3://b/r1"), ("run", "s3://b/r2")]
    assert job("drill", "s3://b/r1", "--faults", "kill").places == [("run", "s3://b/r1")]
    assert job("prepare", "configs/data/demo.yaml", "--source", "s3://b/s", "--out", "s3://b/o").places == [
        ("option '--source'", "s3://b/s"), ("option '--out'", "s3://b/o"),
    ]  # fmt: skip
    encode = job("encode", "s3://b/d", "--cache", "/c", "--text", "/models/t", "--image", "none")
    assert [path for _, path in encode.places] == ["s3://b/d", "/c", "/models/t"]


def test_a_sweep_needs_the_configs_of_its_methods() -> None:
    files = [path for _, path in job("tune", "configs/sweeps/demo.yaml").files]
    assert {"jobs/tune.py", "configs/sweeps/demo.yaml", "configs/data/demo.yaml", "configs/stair/search.yaml"} <= {
        *files
    }
    sent = Upload.of(REPOSITORY)
    for verb in (TRAIN, ["tune", "configs/sweeps/demo.yaml"], ["check", "/d"]):
        job(*verb).check_files(sent)


@pytest.mark.parametrize("words", [
    ["train", "configs/lightgcn/demo.yaml", "data=s3://b/d"],  # run.storage of the config is relative
    ["train", "configs/lightgcn/demo.yaml", "data=build/data", "run.storage=s3://b/r"],
    [*TRAIN, "run.graphs=graphs"], [*TRAIN, "tracking.mlflow=./mlruns"],
    ["check", "build/data"], ["encode", "s3://b/d", "--text", "models/mine"], ["report", "sweeps/x"],
    ["evaluate", "s3://b/r", "runs/x"], ["demo-data", "--out", "shop"], ["tune", "configs/sweeps/demo.yaml"],
])  # fmt: skip
def test_relative_places_are_refused(words: list[str]) -> None:
    told = refusal(*words)
    assert "a relative path, which for a job begins in a private copy of this folder" in told
    assert told.count("\n") == 0


def test_absolute_places_are_allowed_and_said() -> None:
    lines = job("train", "configs/lightgcn/demo.yaml", "data=/mnt/d", "run.storage=~/runs").check_places()
    assert [line.split(",")[0] for line in lines] == ["key 'data' is '/mnt/d'", "key 'run.storage' is '~/runs'"]
    assert all("every host of the cluster must see the same there" in line for line in lines)
    assert job(*TRAIN, "tracking.mlflow=http://mlflow:5000").check_places() == []


def test_other_protocols_are_refused_here() -> None:
    assert "is neither a local path nor an s3:// URL" in refusal("check", "gs://b/x")


def test_a_bad_config_stops_before_anything_is_sent() -> None:
    assert "unknown key 'train.epoch'; did you mean 'epochs'?" in refusal(*TRAIN, "train.epoch=3")
    assert "'method.name' is 'lightgnc'" in refusal(*TRAIN, "method.name=lightgnc")
    assert "unknown key" in refusal("tune", "configs/sweeps/demo.yaml", "data=s3://b/d", "methds=1")
    assert "unknown key" in refusal("prepare", "configs/data/demo.yaml", "x=1", "--source", "/s", "--out", "/o")


@pytest.mark.parametrize("words", [
    [*TRAIN, "tracking.mlflow=http://user:pw-of-mine@host"], ["check", "s3://u:pw-of-mine@b/d"],
    ["check", "/data/pw-of-mine"],
])  # fmt: skip
def test_secrets_in_arguments_are_refused_and_not_shown(words: list[str]) -> None:
    told = refusal(*words, DB_PASSWORD="pw-of-mine")
    assert "an argument holds" in told
    assert "pw-of-mine" not in told


def test_secrets_in_a_config_file_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (REPOSITORY / "configs/lightgcn/demo.yaml").read_text()
    (tmp_path / "x.yaml").write_text(text + "tracking: {mlflow: 'http://user:hidden@host'}\n")
    monkeypatch.chdir(tmp_path)
    told = refusal("train", "x.yaml")
    assert "the config holds a URL with credentials" in told
    assert "hidden" not in told


def test_a_folder_without_job_scripts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no 'jobs/check.py', which the job runs"):
        job("check", "/d").check_files(Upload.of(tmp_path))
