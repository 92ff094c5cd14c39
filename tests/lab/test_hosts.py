"""The hosts of a lab are apart from each other, and end with the process that built them."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.lab.cluster import answers
from tests.lab.hosts import REPOSITORY, Lab, lack, wait_until

pytestmark = pytest.mark.lab


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    if missing := lack():
        pytest.skip(missing)
    with Lab(tmp_path_factory.mktemp("hosts") / "lab") as lab:
        yield lab


def test_hosts_share_one_disk_and_nothing_else(lab: Lab) -> None:
    for name in ("w1", "w2"):
        lab[name].run(["sh", "-c", f"echo {name} | tee /tmp/mine /dev/shm/mine $HOME/mine"])
        lab[name].run(["sh", "-c", f"echo {name} >> /tmp/shared/ours"])
    assert lab["w1"].run(["sh", "-c", "hostname; cat /tmp/mine /dev/shm/mine $HOME/mine"]).split() == ["w1"] * 4
    assert lab["w2"].run(["cat", "/tmp/shared/ours"]).split() == ["w1", "w2"]
    assert (lab.shared / "ours").read_text().split() == ["w1", "w2"]
    lab["w1"].start(["sleep", "1000"], "sleep")
    wait_until(lambda: lab["w1"].processes("sleep 1000"), 10, "a process")
    assert lab["w2"].processes("sleep 1000") == []
    assert "sleep" not in lab["w2"].run(["ps", "ax"])
    assert "No such file" in lab["w2"].run(["ls", str(lab["w1"].tmp)], check=False)


def test_a_cable_and_the_power_of_one_host(lab: Lab) -> None:
    host, other = lab["w3"], lab["w2"]

    def reached() -> bool:
        return other.inside(lambda: answers(host.address, 8000))

    serve = ["python", "-m", "http.server", "8000"]
    server = host.start(serve, "server")
    wait_until(reached, 20, "the server")
    host.cut()
    assert not reached()
    host.restore()
    wait_until(reached, 20, "the server again")
    host.power_off()
    assert server.wait(10) != 0
    assert not reached()
    host.power_on()
    host.start(serve, "server")
    wait_until(reached, 20, "the server of the new host")


def test_a_lab_ends_with_the_process_that_built_it(tmp_path: Path) -> None:
    code = (
        "import pathlib, signal, sys; from tests.lab.hosts import Lab\n"
        "with Lab(pathlib.Path(sys.argv[1])) as lab:\n"
        "    lab['w1'].start(['sleep', '1234'], 'sleep'); print('built', flush=True); signal.pause()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "lab")]
    builder = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=REPOSITORY)
    assert builder.stdout is not None
    assert builder.stdout.readline() == b"built\n"
    started = psutil.Process(builder.pid).children(recursive=True)
    assert len(started) >= 13  # two for each host, and the network
    builder.send_signal(signal.SIGKILL)
    builder.communicate(timeout=10)
    _, alive = psutil.wait_procs(started, timeout=20)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []
