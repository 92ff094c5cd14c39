"""Hosts that are made of Linux namespaces, for tests of several hosts on one machine. They need root and iproute2.

A host has its own network, process numbers, host name, shared memory, /tmp and HOME. Its process 1 holds all of them:
when that ends, the kernel kills every process of the host and removes its network. Process 1 ends when its standard
input does, hence with the process that built the lab, however that ends. Nothing has a name outside the lab, so labs do
not disturb each other, and none leaves anything behind but files in its folder.

All hosts see the machine's file system, which takes the place of an image: the Python environment and the repository,
to which PYTHONPATH points. What a host writes to /tmp, other hosts do not see, except /tmp/shared, a small disk that
they all share. A real cluster has distrec installed in its image instead.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil

REPOSITORY = Path(__file__).resolve().parents[2]
NAMES = ("head", "w1", "w2", "w3", "client", "storage")
NETWORK = "10.77.0"  # every lab has the same addresses, because no packet leaves it
SHARED = "/tmp/shared"  # on every host
ENVIRONMENT = {
    "PATH": f"{Path(sys.executable).parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/tmp/home",
    "LANG": "C.UTF-8",
    "PYTHONPATH": str(REPOSITORY),
    "PYTHONUNBUFFERED": "1",
    "OMP_NUM_THREADS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}

_CLONE_NEWNET = 0x40000000
_HOLD = "\necho ready\nwhile read -r _; do :; done"  # until the end of standard input; bash reaps orphans meanwhile

# $1: the lab's folder, $2: bytes of the shared disk.
_LAN = """
mount -t tmpfs -o size="$2" shared "$1/shared"
ip link add br0 type bridge
ip link set br0 up
"""

# $1: the lab's folder, $2: the host's name, further ones: folders below /tmp that every host keeps.
_HOST = """
lab=$1 name=$2
shift 2
tmp=$lab/hosts/$name/tmp
hostname "$name"
ip link set lo up
mount -t tmpfs -o size=2g shm /dev/shm
mount --bind "$lab/hosts/etc-hosts" /etc/hosts
mkdir -p "$tmp/home" "$tmp/shared"
mount --bind "$lab/shared" "$tmp/shared"
for kept; do
    mkdir -p "$tmp/${kept#/tmp/}"
    mount --rbind "$kept" "$tmp/${kept#/tmp/}"
done
mount --rbind "$tmp" /tmp
if [ -d "$lab" ]; then mount -t tmpfs hidden "$lab"; fi  # the other hosts' files
"""

T = TypeVar("T")


def lack() -> str | None:
    """What this machine lacks for a lab; None if nothing."""
    if os.geteuid() != 0:
        return "the lab of several hosts needs root"
    for program, package in (("ip", "iproute2"), ("unshare", "util-linux"), ("nsenter", "util-linux")):
        if shutil.which(program) is None:
            return f"the lab of several hosts needs '{program}' (package {package})"
    return None


@dataclass(frozen=True)
class Process:
    """A process of a host. `pid` is its number outside the host."""

    pid: int
    command: str

    def send(self, number: int) -> None:
        """Send a signal; a process that has ended is not an error."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)


class Started:
    """A command that runs on a host, with its output in the file `log`."""

    def __init__(self, popen: subprocess.Popen[bytes], log: Path):
        self.popen, self.log = popen, log

    @property
    def status(self) -> int | None:
        """Its exit status, negative for a signal; None while it runs."""
        return self.popen.poll()

    def send(self, number: int) -> None:
        """Send a signal to the command, not to its children."""
        for child in _children(self.popen.pid):
            Process(child.pid, "").send(number)

    def wait(self, timeout: float) -> int:
        """Its exit status, awaited for `timeout` seconds; then it is killed and `TimeoutError` raised."""
        try:
            return self.popen.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise TimeoutError(f"{' '.join(self.popen.args)} ran for more than {timeout} s:\n{self.tail()}") from None

    def kill(self) -> None:
        """Kill the command and its descendants."""
        for child in _children(self.popen.pid, recursive=True):
            Process(child.pid, "").send(signal.SIGKILL)
        self.popen.kill()
        self.popen.wait(10)

    def text(self) -> str:
        """What it has written so far."""
        return self.log.read_text(errors="replace")

    def tail(self, lines: int = 40) -> str:
        """Its last lines."""
        return "\n".join(self.text().splitlines()[-lines:])


class Host:
    """One host of a lab. Its files in /tmp are in the folder `tmp` outside."""

    def __init__(self, lab: Lab, name: str, number: int):
        self.lab, self.name, self.address, self._number = lab, name, f"{NETWORK}.{number}", number
        self.tmp = lab.folder / "hosts" / name / "tmp"
        self.environment: dict[str, str] = {}  # beside ENVIRONMENT
        self._holder: subprocess.Popen[bytes] | None = None
        self._pid = 0
        self._cable = f"ve-{name}"

    @property
    def is_on(self) -> bool:
        return self._holder is not None

    @property
    def root(self) -> Path:
        """Its root folder as seen from outside, with what is mounted there."""
        return Path(f"/proc/{self._pid}/root")

    def power_on(self) -> None:
        """Start the host with an empty /tmp/r, /dev/shm and network; other files in /tmp are as they were."""
        assert not self.is_on, f"{self.name} is on"
        kept = [str(path) for path in needed() if path.is_relative_to("/tmp")]
        flags = ("--mount", "--uts", "--ipc", "--net", "--pid", "--fork", "--kill-child=KILL", "--mount-proc")
        arguments = (str(self.lab.folder), self.name, *kept)
        shutil.rmtree(self.tmp / "r", ignore_errors=True)
        self._holder = _hold(
            (*self.lab.enter("--mount"), "unshare", *flags), _HOST, arguments, self.lab.logs / f"{self.name}-init.log"
        )
        (first,) = _children(self._holder.pid)
        self._pid = first.pid
        # The same hardware address every time: other hosts remember it for a while.
        other_end = ("name", "eth0", "address", f"02:00:00:00:00:{self._number:02x}", "netns", str(first.pid))
        self.lab.on_lan("ip", "link", "add", self._cable, "type", "veth", "peer", *other_end)
        self.lab.on_lan("ip", "link", "set", self._cable, "master", "br0", "up")
        self.run(["ip", "address", "add", f"{self.address}/24", "dev", "eth0"])
        self.run(["ip", "link", "set", "eth0", "up"])

    def power_off(self) -> None:
        """End the host as a loss of power does: the network falls silent first, so no peer sees a connection close."""
        if self._holder is not None:
            self.lab.on_lan("ip", "link", "delete", self._cable, check=False)
            holder, self._holder = self._holder, None
            _release(holder)

    def cut(self) -> None:
        """Pull the network cable."""
        self.lab.on_lan("ip", "link", "set", self._cable, "down")

    def restore(self) -> None:
        """Put the network cable back in."""
        self.lab.on_lan("ip", "link", "set", self._cable, "up")

    def enter(self, cwd: str = "/tmp") -> list[str]:
        """The beginning of a command line that runs a command on this host."""
        namespaces = ("--mount", "--uts", "--ipc", "--net", "--pid")
        return ["nsenter", "--target", str(self._pid), *namespaces, f"--wdns={cwd}"]

    def variables(self, more: Mapping[str, str] | None = None) -> dict[str, str]:
        """The environment of a command on this host."""
        return {**ENVIRONMENT, **self.environment, **(more or {})}

    def start(
        self, command: Sequence[str], log: str, cwd: str = "/tmp", environment: Mapping[str, str] | None = None
    ) -> Started:
        """Start a command, with its output in the file `<host>-<log>.log` of the lab's folder `logs`."""
        assert self.is_on, f"{self.name} is off"
        path = self.lab.logs / f"{self.name}-{log}.log"
        with open(path, "wb") as file:
            popen = subprocess.Popen(
                [*self.enter(cwd), *command], env=self.variables(environment), stdin=subprocess.DEVNULL,
                stdout=file, stderr=file, start_new_session=True,
            )  # fmt: skip
        started = Started(popen, path)
        self.lab.started.append(started)
        return started

    def run(
        self,
        command: Sequence[str],
        timeout: float = 30,
        cwd: str = "/tmp",
        environment: Mapping[str, str] | None = None,
        check: bool = True,
    ) -> str:
        """Run a command and return its output, both streams together.

        Raises:
            RuntimeError: it failed, unless `check` is false.
            TimeoutError: it took longer than `timeout` seconds; it is killed.
        """
        self.lab.runs += 1
        started = self.start(command, f"run-{self.lab.runs}", cwd, environment)
        status = started.wait(timeout)
        self.lab.started.remove(started)
        text = started.text()
        started.log.unlink()
        if check and status:
            raise RuntimeError(f"on {self.name}, {' '.join(command)} ended with status {status}:\n{text[-4000:]}")
        return text

    def processes(self, pattern: str = "") -> list[Process]:
        """The host's processes whose command line or title contains `pattern`, but for its process 1."""
        space, found = os.readlink(f"/proc/{self._pid}/ns/pid"), []
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                if process.pid != self._pid and os.readlink(f"/proc/{process.pid}/ns/pid") == space:
                    command = " ".join(process.cmdline()).strip()
                    if pattern in command and process.status() != psutil.STATUS_ZOMBIE:
                        found.append(Process(process.pid, command))
        return found

    def kill(self, pattern: str, number: int = signal.SIGKILL) -> list[Process]:
        """Send a signal to the processes of `processes(pattern)`, of which there must be one; returns them."""
        found = self.processes(pattern)
        assert found, f"no process of {self.name} has '{pattern}' in its command line"
        for process in found:
            process.send(number)
        return found

    def freeze(self, pattern: str) -> list[Process]:
        """Stop processes without ending them."""
        return self.kill(pattern, signal.SIGSTOP)

    def thaw(self, pattern: str) -> list[Process]:
        """Let frozen processes go on."""
        return self.kill(pattern, signal.SIGCONT)

    def inside(self, work: Callable[[], T]) -> T:
        """Call `work` in a thread of this process that uses the network of this host."""
        assert self.is_on, f"{self.name} is off"
        with self.pool() as pool:
            return pool.submit(work).result()

    def pool(self) -> ThreadPoolExecutor:
        """One thread of this process that uses the network of this host."""
        return ThreadPoolExecutor(1, initializer=_use_network, initargs=(self._pid,))


class Lab:
    """A context with hosts `NAMES` on one network, all of them on.

    Args:
        folder: a new folder for files and logs.
        disk: size of the disk that all hosts share, in bytes.
    """

    def __init__(self, folder: Path, disk: int = 512 << 20):
        self.folder, self.logs = folder.resolve(), folder.resolve() / "logs"
        self.hosts = {name: Host(self, name, number) for number, name in enumerate(NAMES, 1)}
        self.started: list[Started] = []
        self.runs = 0
        self._disk = disk
        self._lan: subprocess.Popen[bytes] | None = None
        self._stack = ExitStack()

    def __getitem__(self, name: str) -> Host:
        return self.hosts[name]

    def __enter__(self) -> Lab:
        with ExitStack() as stack:
            for name in ("logs", "shared"):
                (self.folder / name).mkdir(parents=True)
            for host in self.hosts.values():
                host.tmp.mkdir(parents=True)
                host.tmp.chmod(0o1777)
            names = "".join(f"{host.address} {host.name}\n" for host in self.hosts.values())
            (self.folder / "hosts" / "etc-hosts").write_text(f"127.0.0.1 localhost\n{names}")
            self._lan = _hold(
                ("unshare", "--net", "--mount"), _LAN, (str(self.folder), str(self._disk)), self.logs / "lan.log"
            )
            stack.callback(_release, self._lan)
            for host in self.hosts.values():
                stack.callback(host.power_off)
                host.power_on()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stack.close()
        for started in self.started:
            started.kill()

    @property
    def shared(self) -> Path:
        """The disk that all hosts share, as seen from outside."""
        assert self._lan is not None
        return Path(f"/proc/{self._lan.pid}/root{self.folder}/shared")

    def enter(self, *namespaces: str) -> tuple[str, ...]:
        """The beginning of a command line that enters namespaces of the network between the hosts."""
        assert self._lan is not None
        return "nsenter", "--target", str(self._lan.pid), *namespaces

    def on_lan(self, *command: str, check: bool = True) -> None:
        """Run a command in the network between the hosts, where every host `h` has the cable `ve-h`."""
        done = subprocess.run((*self.enter("--net"), *command), capture_output=True, text=True, timeout=30)
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip()}")


def needed() -> list[Path]:
    """What every host must see of the machine, even below /tmp, which each host has for itself."""
    return [REPOSITORY, Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve()]


def _hold(unshare: Sequence[str], script: str, arguments: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """Start a process that enters new namespaces, runs `script`, says so, and then keeps them until it is released."""
    with open(log, "ab") as file:
        popen = subprocess.Popen(
            [*unshare, "bash", "-euc", script + _HOLD, "bash", *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, start_new_session=True,
        )  # fmt: skip
    assert popen.stdout is not None
    if popen.stdout.readline() != b"ready\n":  # the end of the output, if the script fails
        popen.kill()
        popen.wait(10)
        raise RuntimeError(f"a host could not be made:\n{log.read_text()}")
    return popen


def _release(holder: subprocess.Popen[bytes]) -> None:
    for child in _children(holder.pid):
        Process(child.pid, "").send(signal.SIGKILL)
    holder.kill()
    holder.communicate(timeout=30)


def _children(pid: int, recursive: bool = False) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive)
    except psutil.NoSuchProcess:
        return []


def _use_network(pid: int) -> None:
    """Move this thread, not the process, to the network of process `pid`."""
    with open(f"/proc/{pid}/ns/net") as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def wait_until(true: Callable[[], T], timeout: float, what: str, every: float = 0.2) -> T:
    """Call `true` until its result is true, and return that.

    Raises:
        TimeoutError: it is not within `timeout` seconds; `what` says what was awaited.
    """
    deadline = time.monotonic() + timeout
    while not (result := true()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {timeout:.0f} s")
        time.sleep(every)
    return result
