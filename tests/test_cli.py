"""The command line: exit statuses, usage, interruption outside training, and the job script of each verb."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distrec.cli import main
from tests.training import small

REPOSITORY = Path(__file__).resolve().parents[1]
JOBS = ["demo-data", "synth", "prepare", "check", "encode", "train", "tune", "evaluate", "report", "drill", "doctor"]
VERBS = [*JOBS, "submit"]


def start(*command: str) -> subprocess.Popen[str]:
    """A process of this Python in the repository."""
    return subprocess.Popen(
        [sys.executable, *command], cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        # Children inherit an ignored SIGINT, and a shell makes its background jobs, such as this suite, ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def finish(process: subprocess.Popen[str], timeout: float = 120) -> tuple[int, str, str]:
    """Wait for the process to end; its exit status, output and errors."""
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, out, err


@pytest.mark.parametrize("arguments", [
    [], ["trian"], ["train"], ["check", "a", "b"], ["check", "a", "--deep"], ["train", "c.yaml", "--fast"],
    ["evaluate", "r", "--split", "train"],
])  # fmt: skip
def test_wrong_usage_has_status_2_and_shows_the_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: distrec" in capsys.readouterr().err


@pytest.mark.parametrize("verb", [[], *([verb] for verb in VERBS)])
def test_help_names_what_there_is(verb: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*verb, "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ([] if verb else VERBS))


def test_overrides_stand_before_or_after_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = small.write_config(tmp_path / "run.yaml", "data", tmp_path)
    shown = set()
    for arguments in (
        [config, "train.epochs=9", "train.seed=4", "--print-config"],
        [config, "--print-config", "train.epochs=9", "train.seed=4"],
        ["--print-config", config, "train.epochs=9", "train.seed=4"],
        [config, "train.epochs=9", "--print-config", "train.seed=4"],
    ):
        assert main(["train", *arguments]) == 0
        shown.add(capsys.readouterr().out)
    (only,) = shown
    assert "\n  epochs: 9  # " in only
    assert "\n  seed: 4  # " in only


def test_every_verb_has_a_job_script() -> None:
    assert {path.stem.replace("_", "-") for path in (REPOSITORY / "jobs").glob("*.py")} == set(JOBS)


@pytest.mark.parametrize("verb", JOBS)
def test_a_job_script_takes_the_arguments_of_its_verb(verb: str, tmp_path: Path) -> None:
    script = str(REPOSITORY / "jobs" / f"{verb.replace('-', '_')}.py")
    bad = {"prepare": ["absent.yaml", "--source", "s", "--out", str(tmp_path / "o")], "demo-data": ["--seed", "x"]}
    arguments = bad.get(verb, [str(tmp_path / "absent")])
    status, _, told = finish(start(script, *arguments))
    assert status == 2
    assert "Traceback" not in told
    assert f"distrec {verb}: " in told


def test_the_installed_command_and_the_module_are_the_same(tmp_path: Path) -> None:
    absent = str(tmp_path / "absent")
    command = subprocess.run(
        [str(Path(sys.executable).parent / "distrec"), "check", absent],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    module = finish(start("-m", "distrec.cli", "check", absent))
    assert (command.returncode, command.stderr) == (module[0], module[2])
    assert command.returncode == 2


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_verb_has_status_130(tmp_path: Path, signum: signal.Signals) -> None:
    process = start("-m", "distrec.cli", "demo-data", "--out", str(tmp_path / "shop"))
    deadline = time.monotonic() + 60
    while not (tmp_path / "shop").exists() and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signum)
    status, _, told = finish(process)
    assert status == 130
    assert told == "distrec demo-data: interrupted\n"


def test_a_closed_pipe_ends_in_silence_and_is_no_bad_input(tmp_path: Path) -> None:
    config = small.write_config(tmp_path / "run.yaml", "data", tmp_path)
    process = start("-m", "distrec.cli", "train", config, "--print-config")
    assert process.stdout is not None
    process.stdout.close()  # as `| head` does, if only later
    assert process.stderr is not None
    told = process.stderr.read()
    assert (process.wait(120), told) == (141, "")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["train"], "the following arguments are required: config\n"),
        (["train", "--print-config"], "the following arguments are required: config\n"),
        (["tune"], "the following arguments are required: SWEEP\n"),
        (["prepare"], "the following arguments are required: config, --source, --out\n"),
        (["check", "a", "b"], "distrec check has no argument 'b'; see 'distrec check --help'.\n"),
        (["train", "c.yaml", "x=1", "--fast"], "distrec train has no argument '--fast'; see"),
        (["demo-data", "--out", "x", "--seed", "010"], "value '010': the number '010' could mean 10"),
        (["demo-data", "--out", "x", "--seed", "9" * 5000], "is beyond 64 bits"),
        (["demo-data", "--out", "x", "--seed", "1.5"], "argument --seed: value '1.5' is not a whole number; give one."),
        (["encode", "x", "--batch", "{{ x }}"], "argument --batch: value '{{ x }}'"),
    ],
)
def test_wrong_usage_says_what_is_wrong(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert told in capsys.readouterr().err


PATHS = [
    ["demo-data", "--out", "{}"],
    ["synth", "graph", "--users", "9", "--items", "20", "--edges", "30", "--dim", "2", "--out", "{}"],
    ["prepare", "configs/data/demo.yaml", "--source", "{}", "--out", "x"],
    ["prepare", "configs/data/demo.yaml", "--source", "tests", "--out", "{}"],
    ["prepare", "{}", "--source", "tests", "--out", "x"],
    ["check", "{}"],
    ["encode", "{}"],
    ["train", "{}"],
    ["train", "configs/lightgcn/demo.yaml", "data={}"],
    ["train", "configs/lightgcn/demo.yaml", "run.storage={}"],
    ["train", "configs/lightgcn/demo.yaml", "run.graphs={}"],
    ["tune", "{}"],
    ["tune", "configs/sweeps/demo.yaml", "data={}"],
    ["tune", "configs/sweeps/demo.yaml", "run.storage={}"],
    ["evaluate", "{}"],
    ["evaluate", "tests", "--beside", "{}"],
    ["report", "{}"],
    ["drill", "{}"],
]


@pytest.mark.parametrize("arguments", PATHS, ids=" ".join)
@pytest.mark.parametrize("path", ["memory://x", "S3://bucket/x", "~nobody-of-that-name/x"])
def test_every_path_is_understood_alike(
    arguments: list[str], path: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    assert main([argument.format(path) for argument in arguments]) == 2
    told = capsys.readouterr().err
    assert f"'{path}' is neither a local path nor an s3:// URL" in told or "names a user that does not exist" in told
    assert told.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"[" * 100_000, "is not valid JSON: it is nested more than 32 deep; fix it."),
        (b'{"test": {"best": {"recall@20": NaN}}}', "is not valid JSON: the number NaN is not finite"),
        ('{"test": {}}'.encode("utf-16"), "is UTF-16, not UTF-8; save it as UTF-8."),
        (b'{"tset": {}}', "has no metrics of split 'test'; write {split: {name: {metric: value}}}."),
        (b"[1]", "has no metrics of split 'test'"),
        (b'{"test": {"best": 3}}', "'best' of split 'test' is 3; write {split: {name: {metric: value}}}"),
        (b'{"test": {"best": {"recall@20": "x"}}}', "'best.recall@20' of split 'test' is 'x'"),
        (b'{"test": {"best": {"recall@20": true}}}', "'best.recall@20' of split 'test' is True"),
    ],
)
def test_a_file_of_another_form_beside_the_runs_is_refused(
    content: bytes, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "beside.json").write_bytes(content)
    assert main(["evaluate", "absent", "--beside", str(tmp_path / "beside.json")]) == 2
    said = capsys.readouterr().err
    assert told in said
    assert said.count("\n") == 1
