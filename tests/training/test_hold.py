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
from distrec.errors import InputError, Interrupted, StorageError
from distrec.training import hold
from distrec.training.hold import Hold, require_free

REPOSITORY = Path(__file__).resolve().parents[2]
# For each line of input, a process of its own takes a folder and holds it until SIGTERM. Forks start at once, and one
# that is killed stays a zombie, since nobody waits for it.
HOLDERS = """
import json, os, signal, sys
from distrec.data.storage import open_folder
from distrec.errors import InputError
from distrec.training import hold

hold.BEAT, hold._SETTLE = 0.1, 0.05

def say(text):
    os.write(1, f"{os.getpid()} {text}\\n".encode())

def work(path, environment):
    os.environ.update(environment)
    try:
        with hold.Hold(open_folder(path), "run", path):
            say("held")
            signal.sigwait([signal.SIGTERM])
        say("left")
    except InputError as error:
        say(f"refused: {error}")

signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
for line in sys.stdin:
    if os.fork() == 0:
        work(*json.loads(line))
        os._exit(0)
"""
LOOKING = "s whether that is alive"


class Others:
    """Other processes that hold folders."""

    def __init__(self) -> None:
        self.parent = subprocess.Popen(
            [sys.executable, "-c", HOLDERS], cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self._started: list[int] = []

    def take(self, path: str, count: int = 1) -> dict[int, str]:
        """Let `count` processes take a folder at the same time; returns what each says, by its number."""
        assert self.parent.stdin is not None
        environment = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
        self.parent.stdin.write(f"{json.dumps([path, environment])}\n" * count)
        self.parent.stdin.flush()
        return dict(self.said() for _ in range(count))

    def said(self) -> tuple[int, str]:
        """The next line of any process, and its number."""
        assert self.parent.stdout is not None
        process, _, text = self.parent.stdout.readline().strip().partition(" ")
        self._started.append(int(process))
        return int(process), text

    def holder(self, path: str) -> int:
        """Start a process that holds a folder; returns its number."""
        ((process, text),) = self.take(path).items()
        assert text == "held"
        return process

    def kill(self, process: int) -> None:
        """Kill a process, and wait until it has ended; what it was just writing has arrived then."""
        os.kill(process, signal.SIGSTOP)
        time.sleep(0.2)
        os.kill(process, signal.SIGKILL)
        while hold._process_started(process) is not None:
            time.sleep(0.01)

    def end(self) -> None:
        for process in self._started:  # zombies, of which none has another's number before their parent ends
            os.kill(process, signal.SIGKILL)
        self.parent.kill()
        self.parent.communicate(timeout=10)


@pytest.fixture(scope="module")
def others() -> Iterator[Others]:
    found = Others()
    yield found
    found.end()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("BEAT", 0.1), ("WATCH", 0.2), ("LOOK", 0.1), ("STEP", 0.02), ("_SETTLE", 0.05)):
        monkeypatch.setattr(hold, name, seconds)


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process seems to run on another machine than those of `others`."""
    monkeypatch.setattr(hold, "_machine", lambda: "another boot pid:[1]")


@pytest.fixture(params=["disk", "bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The path of a run's folder, which does not exist yet."""
    return f"{request.getfixturevalue('s3')}/runs/one" if request.param == "bucket" else str(tmp_path / "runs/one")


def take(path: str) -> None:
    """Take a folder and let it go."""
    folder = open_folder(path)
    with Hold(folder, "run", path):
        assert len(hold.holders(folder)) == 1
    assert hold.holders(folder) == []


def test_of_several_newcomers_one_holds_a_folder(others: Others, place: str) -> None:
    answers = others.take(place, 3)
    assert [answer.partition(":")[0] for answer in sorted(answers.values())] == ["held", "refused", "refused"]
    (winner,) = (process for process, answer in answers.items() if answer == "held")
    assert all(f"process {winner} on host" in answer for process, answer in answers.items() if process != winner)
    os.kill(winner, signal.SIGTERM)
    assert others.said() == (winner, "left")
    take(place)


def test_the_process_of_a_killed_attempt_is_known_to_be_dead(others: Others, place: str, capsys: Any) -> None:
    process = others.holder(place)
    os.kill(process, signal.SIGSTOP)  # standing still is not being dead
    refused = f"is being trained by process {process} on host .*; wait until it ends, "
    with pytest.raises(InputError, match=f"{refused}stop that process, or use another 'run.name'.$"):
        take(place)
    with pytest.raises(InputError, match=f"{refused}or stop that process.$"):  # as 'distrec evaluate' says it
        require_free(open_folder(place), "run")
    others.kill(process)
    take(place)
    assert LOOKING not in capsys.readouterr().out


def test_another_machine_watches_for_signs_of_life(
    others: Others, place: str, elsewhere: None, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = others.holder(place)
    monkeypatch.setattr(hold, "WATCH", 100)  # until the next beat, however late that is
    with pytest.raises(InputError, match=f"is being trained by process {process} on host"):
        take(place)
    assert f"looking for up to 100 {LOOKING}" in capsys.readouterr().out
    others.kill(process)
    monkeypatch.setattr(hold, "WATCH", 0.2)
    started = time.monotonic()
    take(place)
    assert time.monotonic() - started > hold.LOOK
    assert LOOKING in capsys.readouterr().out


def test_what_stood_still_for_long_is_looked_at_shortly(
    others: Others, tmp_path: Path, elsewhere: None, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hold, "WATCH", 3600.0)
    folder = open_folder(str(tmp_path))
    others.kill(others.holder(str(tmp_path)))
    (name,) = hold.holders(folder)
    os.utime(folder.at(name), (time.time() - 7200,) * 2)
    take(str(tmp_path))
    assert f"looking for up to 0 {LOOKING}" in capsys.readouterr().out

    process = others.holder(str(tmp_path))  # it writes although its last writing seems to be old
    os.kill(process, signal.SIGSTOP)
    time.sleep(0.2)
    os.utime(folder.at(*hold.holders(folder)), (0, 0))
    monkeypatch.setattr(hold, "LOOK", 60.0)
    threading.Timer(0.5, os.kill, (process, signal.SIGCONT)).start()
    with pytest.raises(InputError, match=f"is being trained by process {process} on host"):
        take(str(tmp_path))


def test_an_attempt_that_was_taken_over_says_so_and_leaves_the_folder_alone(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = open_folder(place)
    with Hold(folder, "run", place) as first:
        first._done.set()  # suspended: no more beats
        first._thread.join()
        monkeypatch.setattr(hold, "_machine", lambda: "another boot pid:[1]")
        with Hold(folder, "run", place) as second:
            with pytest.raises(InputError, match=rf"taken over by process {os.getpid()} on host.* stood still for mo"):
                first.require()
            first._done.clear()  # it goes on
            first._beat()  # returns, since it has lost the folder
            first.__exit__()
            second.require()
            assert hold.holders(folder) == [second._name]
            assert second._name == "holder-000002.json"
    assert hold.holders(folder) == []


def test_a_lost_hold_explains_other_errors_and_an_unreadable_one_hides_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = open_folder(str(tmp_path))

    def raised(held: Hold, error: Exception | None) -> BaseException:
        with pytest.raises(Exception) as found, held.holding():  # noqa: PT011, PT012
            if error is not None:
                raise error
        return found.value

    def unreadable(*_: Any) -> Any:
        raise StorageError("gone")

    crash, stop = RuntimeError("crash"), Interrupted("stopped")
    with Hold(folder, "run", str(tmp_path)) as held:
        with held.holding():
            pass
        assert raised(held, crash) is crash
        with monkeypatch.context() as patch:
            patch.setattr(Folder, "names", unreadable)
            assert raised(held, crash) is crash
            assert str(raised(held, None)) == "gone"
        held._done.set()
        held._thread.join()
        folder.remove(held._name)
        for error in (crash, None):
            assert "holder-000001.json' was deleted or overwritten, so this attempt" in str(raised(held, error))
        assert raised(held, stop) is stop


@pytest.mark.parametrize("name", ["holder-000001.json", "holder-000002.json", "holder-000007.json"])
def test_a_newcomer_never_takes_the_place_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Between our look at a dead attempt's file and our own file, another newcomer takes the folder."""
    path, create = tmp_path / "holder-000001.json", Folder.create
    mine = {"process": os.getpid(), "process_started": hold._process_started(os.getpid()), "token": "theirs"}
    theirs = record(**mine)
    monkeypatch.setattr(hold, "_ACTIVE", {"theirs"})
    path.write_bytes(record(process=2**22 + 1))

    def late(self: Folder, data: bytes, *parts: str) -> bool:
        if path.exists():
            path.unlink()
            (tmp_path / name).write_bytes(theirs)
        return create(self, data, *parts)

    monkeypatch.setattr(Folder, "create", late)
    with pytest.raises(InputError, match=f"is being trained by process {os.getpid()}"):
        take(str(tmp_path))
    assert (tmp_path / name).read_bytes() == theirs


def test_a_request_that_was_sent_again_meets_its_own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer to the first request was lost, so the client sent it again, and the store says that a file exists."""
    create = Folder.create
    monkeypatch.setattr(Folder, "create", lambda *given: not create(*given))
    take(str(tmp_path))


def test_a_beat_survives_an_error_of_the_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, content: Callable[[], bytes] | None, waits: bool
) -> None:
    monkeypatch.setattr(hold, "WATCH", 0.05)
    path = tmp_path / "holder-000041.json"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content())
    for name in ("holder-1.json", "holder-x.json", "holder-000001.json.part"):
        (tmp_path / name).touch()  # no holders
    take(str(tmp_path))
    assert (LOOKING in capsys.readouterr().out) == waits
    assert not path.exists()


def test_threads_of_one_process_are_told_apart(tmp_path: Path) -> None:
    with Hold(open_folder(str(tmp_path)), "run", str(tmp_path)), pytest.raises(InputError, match="is being trained by"):
        take(str(tmp_path))
    take(str(tmp_path))


def test_a_folder_that_stays_empty_is_removed(tmp_path: Path) -> None:
    take(str(tmp_path / "runs/one"))
    assert not (tmp_path / "runs/one").exists()
    (tmp_path / "mine").mkdir()
    take(str(tmp_path / "mine"))
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
    take(f"{s3}/runs/one")
