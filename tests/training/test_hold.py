"""One attempt at a time holds a folder, on disks and in buckets: the living refuse newcomers, the dead never do."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from distrec.data.storage import Folder, open_folder
from distrec.errors import InputError
from distrec.training import hold
from distrec.training.hold import Hold, require_free

REPOSITORY = Path(__file__).resolve().parents[2]
HOLDER = """
import sys, time
from distrec.data.storage import open_folder
from distrec.errors import InputError
from distrec.training import hold
hold.BEAT, hold.WATCH, hold.LOOK = 0.2, 2.0, 0.1
path, seconds = sys.argv[1:]
print("ready", flush=True)
sys.stdin.readline()
try:
    with hold.Hold(open_folder(path), "run", path):
        print("held", flush=True)
        time.sleep(float(seconds))
except InputError as error:
    print("refused:", error, flush=True)
"""
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("BEAT", 0.2), ("WATCH", 2.0), ("LOOK", 0.1)):
        monkeypatch.setattr(hold, name, seconds)


@pytest.fixture
def elsewhere(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process seems to run on another machine than those of `start`."""
    monkeypatch.setattr(hold, "_machine", lambda: "another boot pid:[1]")


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a process that waits for a line of input, then holds a folder for some seconds."""
    started: list[subprocess.Popen[str]] = []

    def begin(path: str, seconds: float = 60) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, path, str(seconds)], cwd=REPOSITORY, text=True,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        started.append(process)
        assert said(process) == "ready"
        return process

    yield begin
    for process in started:
        process.kill()
        process.communicate(timeout=10)


@pytest.fixture(params=["disk", "bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The path of a run's folder, which does not exist yet."""
    return f"{request.getfixturevalue('s3')}/runs/one" if request.param == "bucket" else str(tmp_path / "runs/one")


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def taken(path: str) -> float:
    """Take a folder and let it go; returns the seconds that this took."""
    started, folder = time.monotonic(), open_folder(path)
    with Hold(folder, "run", path):
        assert len(hold.holders(folder)) == 1
    assert hold.holders(folder) == []
    return time.monotonic() - started


def test_of_several_newcomers_one_holds_a_folder(start: Start, place: str) -> None:
    processes = [start(place, 3) for _ in range(3)]
    for process in processes:
        go(process)
    answers = [said(process) for process in processes]
    assert [answer.partition(":")[0] for answer in sorted(answers)] == ["held", "refused", "refused"]
    winner = processes[answers.index("held")]
    assert all(f"process {winner.pid} on host" in answer for answer in answers if answer != "held")
    winner.wait(20)
    assert taken(place) < 5


def test_the_process_of_a_killed_attempt_is_known_to_be_dead(start: Start, place: str) -> None:
    process = start(place)
    go(process)
    assert said(process) == "held"
    process.send_signal(signal.SIGSTOP)  # standing still is not being dead
    for check in (lambda: taken(place), lambda: require_free(open_folder(place), "run")):
        with pytest.raises(InputError, match=f"is being trained by process {process.pid} on host"):
            check()
    process.kill()
    while hold._process_started(process.pid) is not None:  # it stays a zombie, since nobody has waited for it
        time.sleep(0.01)
    assert taken(place) < 5


def test_another_machine_watches_for_signs_of_life(
    start: Start, place: str, elsewhere: None, capsys: pytest.CaptureFixture[str]
) -> None:
    process = start(place)
    go(process)
    assert said(process) == "held"
    with pytest.raises(InputError, match=f"is being trained by process {process.pid} on host"):
        taken(place)
    process.kill()
    process.wait(10)
    assert 2 < taken(place) < 10
    assert "looking for up to 2 s whether that is alive" in capsys.readouterr().out


def test_an_attempt_that_was_taken_over_says_so_and_leaves_the_folder_alone(
    place: str, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = open_folder(place)
    with Hold(folder, "run", place) as first:
        first._done.set()  # suspended: no more beats
        first._thread.join()
        monkeypatch.setattr(hold, "_machine", lambda: "another boot pid:[1]")
        with Hold(folder, "run", place) as second:
            with pytest.raises(InputError, match=rf"was taken over by process {os.getpid()} on host"):
                first.require()
            first._done.clear()  # it goes on
            first._beat()  # returns, since it has lost the folder
            first.__exit__()
            second.require()
            assert hold.holders(folder) == [second._name]
            assert second._name == "holder-000002.json"
    assert hold.holders(folder) == []


def test_a_beat_survives_an_error_of_the_storage(tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, write, failures = open_folder(str(tmp_path)), Folder.write_json, [OSError("gone"), ValueError("odd")]
    beats = threading.Event()

    def sometimes(self: Folder, value: Any, *parts: str) -> None:
        if failures:
            raise failures.pop()
        write(self, value, *parts)
        beats.set()

    monkeypatch.setattr(Folder, "write_json", sometimes)
    with Hold(folder, "run", str(tmp_path)):
        assert beats.wait(10)
    assert failures == []


def record(**changes: Any) -> bytes:
    mine = {"token": "t", "host": "h", "machine": hold._machine(), "process": 1, "process_started": 7,
            "job": None, "since": "2026-01-31T12:00:00Z", "beat": 3}  # fmt: skip
    return json.dumps({**mine, **changes}).encode()


@pytest.mark.parametrize(
    ("content", "waits"),
    [
        (lambda: record(process=2**22 + 1), False),  # larger than any process number
        (lambda: record(process=os.getpid()), False),  # another process had this number before
        (lambda: record(process=os.getpid(), process_started=hold._process_started(os.getpid())), False),
        (lambda: record(machine="an earlier boot"), True),
        (lambda: record(process="7"), True),
        (lambda: record(process=10**30), True),
        (lambda: b"", True),
        (lambda: b"{", True),
        (lambda: b"[1]", True),
        (lambda: b"\xff\0", True),
        (None, True),
    ],
)
def test_what_a_dead_attempt_left_never_blocks(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch, content: Callable[[], bytes] | None, waits: bool
) -> None:
    monkeypatch.setattr(hold, "WATCH", 0.3)
    path = tmp_path / "holder-000041.json"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content())
    for name in ("holder-1.json", "holder-x.json", "holder-000001.json.part"):
        (tmp_path / name).touch()  # no holders
    assert (taken(str(tmp_path)) > 0.3) == waits
    assert not path.exists()


def test_threads_of_one_process_are_told_apart(tmp_path: Path) -> None:
    with Hold(open_folder(str(tmp_path)), "run", str(tmp_path)), pytest.raises(InputError, match="is being trained by"):
        taken(str(tmp_path))
    assert taken(str(tmp_path)) < 1


def test_a_folder_that_stays_empty_is_removed(tmp_path: Path) -> None:
    taken(str(tmp_path / "runs/one"))
    assert not (tmp_path / "runs/one").exists()
    (tmp_path / "mine").mkdir()
    taken(str(tmp_path / "mine"))
    assert (tmp_path / "mine").exists()


def test_a_ray_job_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"metadata": {"job_submission_id": "raysubmit_1"}}))
    folder = open_folder(str(tmp_path))
    with (
        Hold(folder, "run", str(tmp_path)),
        pytest.raises(InputError, match=r"Ray job raysubmit_1.* 'ray job stop raysubmit_1'"),
    ):
        require_free(folder, "run")


def test_a_store_without_conditional_writes(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    pipe = s3fs.S3FileSystem._pipe_file

    async def plain(self: Any, path: str, data: bytes, mode: str = "overwrite", **rest: Any) -> Any:
        if mode == "create":
            raise OSError(38, "not implemented")
        return await pipe(self, path, data, **rest)

    monkeypatch.setattr(s3fs.S3FileSystem, "_pipe_file", plain)
    folder = open_folder(f"{s3}/runs/one")
    assert folder.create(b"1", "a")
    assert not folder.create(b"2", "a")
    assert folder.read_bytes("a") == b"1"
    assert taken(f"{s3}/runs/one") < 5
