"""`distrec submit` on a real Ray head with token authentication, which this file starts once."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.ray_head import Head, ray_head
from tests.submission.proxy import Proxy
from tests.training import small

pytestmark = pytest.mark.multiprocess

REPOSITORY = Path(__file__).resolve().parents[2]
TOKEN = "planted-token-" + "7c1f" * 12
PLANTED = "planted-secret-91ab54"


@dataclass(frozen=True)
class Running:
    """A command whose output goes to files."""

    process: subprocess.Popen[bytes]
    folder: Path

    @property
    def out(self) -> str:
        return (self.folder / "out").read_text()

    @property
    def err(self) -> str:
        return (self.folder / "err").read_text()

    def shows(self, text: str, where: str = "out") -> None:
        """Wait until the text is in the output."""
        until(lambda: text in getattr(self, where), f"{text!r} in {where}")

    def finish(self, timeout: float = 120) -> tuple[int, str, str]:
        try:
            self.process.wait(timeout)
        finally:
            self.process.kill()
        return self.process.returncode, self.out, self.err


@dataclass(frozen=True)
class Client:
    """Runs commands in a working folder, with secrets in the environment."""

    head: Head
    folder: Path
    environment: dict[str, str]

    def start(self, *words: str, address: str | None = None, **changes: str) -> Running:
        return self._start(["-m", "distrec.cli", "submit", *words, "--address", address or self.head.address], changes)

    def follow(self, job: str, address: str | None = None) -> Running:
        return self._start(["-m", "tests.submission.impatient", address or self.head.address, job], {})

    def _start(self, words: list[str], changes: dict[str, str]) -> Running:
        folder = Path(tempfile.mkdtemp(dir=self.folder.parent))
        with open(folder / "out", "wb") as out, open(folder / "err", "wb") as err:
            process = subprocess.Popen(
                [sys.executable, *words], cwd=self.folder, env={**self.environment, **changes},
                stdin=subprocess.DEVNULL, stdout=out, stderr=err,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )  # fmt: skip
        return Running(process, folder)

    def submit(self, *words: str, **changes: str) -> tuple[int, str, str]:
        return self.start(*words, **changes).finish()

    def job(self, job: str) -> Any:
        return self.head.get(f"/api/jobs/{job}")


def until(condition: Callable[[], bool], what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A head, and a working folder in which `check` is a script that starts at once."""
    folder = tmp_path_factory.mktemp("head")
    working_dir = folder / "repository"
    working_dir.mkdir()
    for name in ("distrec", "jobs", "configs"):
        shutil.copytree(REPOSITORY / name, working_dir / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "tests/submission/scripted.py", working_dir / "jobs/check.py")
    common = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    with ray_head(folder, 2, common) as head:
        environment = {
            **head.environment, "PYTHONPATH": str(REPOSITORY), "AWS_ACCESS_KEY_ID": f"{PLANTED}-id",
            "AWS_SECRET_ACCESS_KEY": PLANTED, "AWS_SESSION_TOKEN": f"{PLANTED}-session",
            "AWS_ENDPOINT_URL": "http://127.0.0.1:1", "GLOO_SOCKET_IFNAME": "lo",
        }  # fmt: skip
        yield Client(head, working_dir, environment)


def test_a_job_has_the_status_of_its_verb_and_no_secret_is_anywhere(tmp_path: Path, client: Client) -> None:
    data = small.write_small(tmp_path / "data")
    words = ["train", "configs/popularity/demo.yaml", f"data={data}", f"run.storage={tmp_path / 'runs'}"]
    running = client.start(*words, "run.name=first", "train.workers=0", "--env", "MINE=a b")
    lines: set[str] = set()
    while running.process.poll() is None:
        lines |= {" ".join(one.info["cmdline"] or ()) for one in psutil.process_iter(["cmdline"])}
        time.sleep(0.2)
    status, out, err = running.finish()
    assert status == 0, out + err
    assert re.search(r"^upload: \d+ files, [\d.]+ MiB, from ", out, re.MULTILINE)
    assert f"key 'data' is '{data}', a local path: every host of the cluster must see the same there" in out
    assert f"submitted 'first-1' to {client.head.address}\n" in out
    assert re.search(r"^  hit@50 ", out, re.MULTILINE)  # the last line of the run's table
    assert err == "distrec submit: job 'first-1' is done\n"
    assert (tmp_path / "runs/first/summary.json").is_file()

    record = client.job("first-1")
    assert (record["status"], record["driver_exit_code"]) == ("SUCCEEDED", 0)
    assert {name: record["runtime_env"]["env_vars"].get(name) for name in ("RAY_JOB_STOP_WAIT_TIME_S", "MINE")} == {
        "RAY_JOB_STOP_WAIT_TIME_S": "300", "MINE": "a b",
    }  # fmt: skip
    assert record["runtime_env"]["env_vars"]["AWS_ENDPOINT_URL"] == "http://127.0.0.1:1"

    listed = subprocess.run(
        [str(Path(sys.executable).parent / "ray"), "job", "list", "--address", client.head.address],
        env=client.environment, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert "first-1" in listed.stdout
    told = {"output": out + err, "job list": listed.stdout, "jobs": json.dumps(client.head.get("/api/jobs/"))}
    told |= {"process list": "\n".join(lines)}
    logs = [path for path in client.head.sessions.rglob("*") if path.is_file()]
    assert any("first-1" in path.name for path in logs)
    told |= {str(path): path.read_bytes().decode(errors="replace") for path in logs}
    told |= {str(path): path.read_bytes().decode(errors="replace") for path in tmp_path.rglob("*") if path.is_file()}
    assert "configs/popularity/demo.yaml" in told["process list"]
    assert [name for name, text in told.items() if PLANTED in text or TOKEN in text] == []


def test_failures_have_their_own_status(client: Client) -> None:
    odd = "/2/0/3/a b;$HOME'\"`id`*\\|&"
    status, out, err = client.submit("check", odd)
    assert (status, err) == (3, "distrec submit: job 'check-1' ended with exit status 3\n")
    assert out.endswith(f"\nargument {odd}\nline 0\nline 1\n")
    status, _, err = client.submit("check", "/1/0/killed/")
    assert status == 137, err
    status, _, err = client.submit("check", "/1/0/orphaned/")
    assert status == 1
    assert "job 'check-3' failed before or without its command: " in err
    assert client.job("check-3")["driver_exit_code"] is None


def test_bad_input_stops_here(client: Client) -> None:
    for words, told in (
        (["check", "a", "b"], "distrec check has no argument 'b'"),
        (["chek", "/a"], "invalid choice: 'chek'"),
        (["submit", "check", "/a"], "'submit' is no verb that a job can run; name one first"),
        ([], "'' is no verb that a job can run"),
        (["check", "data"], "a relative path, which for a job begins in a private copy"),
        (["check", "/a", "--env", "HF_TOKEN=x"], "'HF_TOKEN', which looks like a secret"),
    ):
        status, out, err = client.submit(*words, "--no-wait", address="http://127.0.0.1:1")
        assert (status, out) == (2, "")
        assert told in err
        assert "Traceback" not in err


def test_submissions_at_the_same_time_get_different_ids(client: Client) -> None:
    started = [client.start("check", "/1/0/0/", "--no-wait") for _ in range(3)]
    outputs = [running.finish() for running in started]
    assert [status for status, _, _ in outputs] == [0, 0, 0], outputs
    ids = {re.findall(r"^submitted '(.*)' to", out, re.MULTILINE)[0] for _, out, _ in outputs}
    assert len(ids) == 3
    assert f"'ray job stop --address {client.head.address} check-" in outputs[0][1]


def test_the_token_must_be_right(client: Client, tmp_path: Path) -> None:
    words = ["check", "/1/0/0/"]
    for changes, told in (
        ({"RAY_AUTH_MODE": "disabled"}, "asks for a token, and none was sent; set RAY_AUTH_MODE=token, and put"),
        ({"RAY_AUTH_TOKEN": "", "HOME": str(tmp_path)}, "asks for a token, and none was sent"),
        ({"RAY_AUTH_TOKEN": "wrong-" + "b" * 40}, "refuses this token; set RAY_AUTH_MODE=token"),
    ):
        status, out, err = client.submit(*words, **changes)
        assert (status, out) == (2, "")
        assert told in err
        assert err.count("\n") == 1, err
        assert "b" * 40 not in err


def test_a_package_of_the_limit_is_refused_by_the_dashboard(client: Client) -> None:
    for excess, expected in ((1, 413), (0, 200)):
        body = bytes(100 * 2**20 + excess)
        request = urllib.request.Request(
            f"{client.head.address}/api/packages/gcs/_ray_pkg_{excess:040}.zip", data=body, method="PUT",
            headers={"Authorization": f"Bearer {TOKEN}"},
        )  # fmt: skip
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                status = answer.status
        except urllib.error.HTTPError as error:
            status = error.code
        assert status == expected


def test_a_cut_log_goes_on_where_it_was(client: Client) -> None:
    with Proxy(int(client.head.address.rpartition(":")[2])) as proxy:
        running = client.start("check", "/80/0.1/3/", address=f"http://127.0.0.1:{proxy.port}")
        for text in ("line 5\n", "line 40\n"):
            running.shows(text)
            assert proxy.drop() > 0
        status, out, err = running.finish()
    assert status == 3, err
    assert re.findall(r"^line (\d+)$", out, re.MULTILINE) == [str(number) for number in range(80)]


@pytest.fixture(scope="module")
def endless(client: Client) -> str:
    """The id of a job that does not end."""
    _, out, _ = client.submit("check", "/1000000/0.1/0/", "--no-wait")
    return str(re.findall(r"^submitted '(.*)' to", out, re.MULTILINE)[0])


def test_a_silent_head_is_waited_for_but_not_for_ever(client: Client, endless: str) -> None:
    with Proxy(int(client.head.address.rpartition(":")[2])) as proxy:
        address = f"http://127.0.0.1:{proxy.port}"
        running = client.follow(endless, address)
        running.shows("line 3\n")
        proxy.freeze()
        running.shows(f"the head at {address} does not answer (no answer within 3 s); trying for 8 s\n", "err")
        proxy.thaw()
        running.shows("the head answers again\n", "err")
        proxy.freeze()
        status, out, err = running.finish()
    assert status == 1
    assert "has not answered for 8 s; the job may still be running: 'ray job logs --follow" in err
    numbers = [int(number) for number in re.findall(r"^line (\d+)$", out, re.MULTILINE)]
    assert numbers == list(range(len(numbers)))


def test_a_job_that_the_head_does_not_know_is_said(client: Client) -> None:
    status, _, err = client.follow("absent-1").finish()
    assert status == 1
    assert "the cluster does not know job 'absent-1' any more: its head was started again" in err


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_without_a_terminal_a_signal_leaves_the_job(signum: signal.Signals, client: Client, endless: str) -> None:
    running = client.follow(endless)
    running.shows("line 2\n")
    running.process.send_signal(signum)
    status, _, err = running.finish(20)
    assert status == 130
    assert f"left job '{endless}' running: 'ray job logs --follow --address {client.head.address} {endless}'" in err
    assert "Traceback" not in err
    assert client.job(endless)["status"] == "RUNNING"


def test_ctrl_c_on_a_terminal_asks_and_a_second_one_leaves(client: Client, endless: str) -> None:
    command = ["-m", "tests.submission.impatient", client.head.address, endless]
    for typed, answer in ((b"\x03", ""), (b"l\n", "l"), (b"\n", "")):
        status, shown = on_terminal(client, command, [("line 2\r\n", b"\x03"), ("[l] ", typed)])
        assert status == 130
        assert f"stop it (s), or leave it running (l)? [l] {answer}" in shown
        assert f"left job '{endless}' running" in shown
        assert client.job(endless)["status"] == "RUNNING"


def test_stopping_waits_until_the_checkpoint_is_saved(client: Client) -> None:
    command = ["-m", "distrec.cli", "submit", "check", "/1000000/0.1/0/", "--address", client.head.address]
    status, shown = on_terminal(client, command, [("line 2\r\n", b"\x03"), ("[l] ", b"s\n")])
    assert status == 130
    assert "stopping the job; it saves a checkpoint first" in shown
    assert "\r\nsaving\r\n" in shown
    assert "\r\nsaved\r\n" in shown  # which takes longer than Ray waits by itself
    (job,) = re.findall(r"submitted '(.*)' to", shown)
    assert f"job '{job}' was stopped; the same command continues" in shown
    assert client.job(job)["status"] == "STOPPED"


def on_terminal(client: Client, command: list[str], typed: list[tuple[str, bytes]]) -> tuple[int, str]:
    """Run a command on a terminal; after each text has been shown, type something. Its status and what it showed."""
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell that starts the tests in the background ignores it
        os.chdir(client.folder)
        os.execvpe(sys.executable, [sys.executable, *command], client.environment)
    shown, deadline = "", time.monotonic() + 90
    with suppress(OSError):  # the terminal is closed
        while time.monotonic() < deadline:
            if select.select([terminal], [], [], 0.2)[0]:
                shown += os.read(terminal, 4096).decode()
            if typed and typed[0][0] in shown:
                os.write(terminal, typed.pop(0)[1])
    os.close(terminal)
    if time.monotonic() > deadline:
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), shown
