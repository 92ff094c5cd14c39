"""Pods on the hosts of a lab: what a kubelet does with a pod, as far as one machine can do it without an image.

A host has one pod. Its root folder is a disposable layer over the machine's own files, which take the place of the
image, with the home folder of the image's user. Everything that the pod writes is in memory and gone with it. Its
processes run as the user that the manifest names. The containers of a pod share this folder, which on Kubernetes they
do not. Limits of CPU and memory, and probes, are missing.
"""

from __future__ import annotations

import os
import shlex
import signal
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from tests.lab.hosts import REPOSITORY, SHARED, Host, Started, needed, wait_until
from tests.lab.pods import Container, Mount, Pod

USER, HOME = 1000, "/home/distrec"  # of the image
_FOLDER = "/tmp/pod"

# $1: the pod's folder, $2: user and group, $3: home of the user, $4: the repository.
_BEGIN = """
mkdir -p "$1"
mount -t tmpfs -o size=4g,mode=755 pod "$1"
mkdir "$1"/{upper,work,root,tmp,volumes}
chmod 1777 "$1/tmp"
mount -t overlay overlay -o "lowerdir=/,upperdir=$1/upper,workdir=$1/work" "$1/root"
for folder in /proc /sys /dev; do mount --rbind "$folder" "$1/root$folder"; done
mount --bind "$1/tmp" "$1/root/tmp"
mkdir -p "$1/root$3"
cp -r "$4/configs" "$4/jobs" "$1/root$3"
chown "$2" "$1/root$3"
if ! getent passwd "${2%:*}" >/dev/null; then echo "pod:x:$2::$3:/bin/bash" >> "$1/root/etc/passwd"; fi
"""


class Placed:
    """A pod on a host that is on and has no other pod.

    Args:
        names: host names with addresses, as the pod resolves them.
    """

    def __init__(self, host: Host, pod: Pod, names: Mapping[str, str]):
        self.host, self.pod = host, pod
        self._containers = [*pod.init, pod.main]
        self._left = list(self._containers)
        self._starts = 0
        self.started: Started | None = None  # the last container that was started
        self._asked: float | None = None  # when it was asked to end
        self._make_root(names)

    @property
    def runs(self) -> bool:
        """Whether its main container was started and has not ended."""
        return self.status is None and not self._left and self.started is not None

    @property
    def status(self) -> int | None:
        """The exit status of its main container; None if that has not ended, or a value for a host without power."""
        if not self.host.is_on:
            return -signal.SIGKILL
        return self.started.status if self.started is not None and not self._left else None

    def advance(self) -> None:
        """Start the next container if the one before has done its work, and one again that is not to have ended."""
        if not self.host.is_on or (self.started is not None and self.started.status is None):
            return
        if self.started is not None and (self.started.status if self._left else self.pod.restarts):
            self.started = self._start(self._containers[-len(self._left) - 1])
        elif self._left:
            self.started = self._start(self._left.pop(0))

    def text(self) -> str:
        """What its containers have written."""
        logs = sorted(self.host.lab.logs.glob(f"{self.host.name}-{self.pod.name}-*.log"))
        return "\n".join(f"== {log.name}\n{log.read_text(errors='replace')}" for log in logs)

    def ask(self) -> None:
        """Ask it to end."""
        if self.host.is_on and self.started is not None and self._asked is None:
            self.started.send(signal.SIGTERM)
        self._asked = self._asked or time.monotonic()

    def end(self) -> None:
        """Ask it to end, wait as long as it may take for that, kill it, and give back an empty host."""
        self.ask()
        if self.host.is_on:
            if (started := self.started) is not None:
                left = self._asked + self.pod.grace - time.monotonic() if self._asked else 0
                with suppress(TimeoutError):
                    wait_until(lambda: started.status is not None, left, self.pod.name)
            self.host.power_off()
        self.host.power_on()

    def _start(self, container: Container) -> Started:
        who = f"--userspec={container.user or USER}:{container.group or USER}"
        groups = f"--groups={'' if container.files_group is None else container.files_group}"
        command = ["chroot", who, groups, f"{_FOLDER}/root", "env", "-C", container.folder or HOME, *container.command]
        environment = {"HOME": HOME, **container.environment}
        self._starts += 1
        return self.host.start(command, f"{self.pod.name}-{self._starts}-{container.name}", environment=environment)

    # The root folder ------------------------------------------------------------------------------------------------

    def _make_root(self, names: Mapping[str, str]) -> None:
        main, root = self.pod.main, f"{_FOLDER}/root"
        owner = f"{main.user or USER}:{main.group or USER}"
        self.host.run(["bash", "-euc", _BEGIN, "bash", _FOLDER, owner, HOME, str(REPOSITORY)])
        lines = "".join(f"{address} {name}\n" for name, address in names.items())
        self._write(Path(f"{root}/etc/hosts"), f"127.0.0.1 localhost\n{lines}".encode(), 0o644)
        mounts = {mount.path: mount for container in self._containers for mount in container.mounts}
        script = "".join(self._line(mounts[path], main.files_group) for path in sorted(mounts))
        folders = [str(folder) for folder in needed()]
        for folder in folders:  # in the layer, before the folders themselves are there
            above = " ".join(shlex.quote(f"{root}{part}") for part in Path(folder).parents)
            script += f"mkdir -p {shlex.quote(root + folder)}\nchmod o+x {above}\n"
        script += "".join(f"mount --rbind {shlex.quote(folder)} {shlex.quote(root + folder)}\n" for folder in folders)
        if main.read_only:
            script += f"mount -o remount,ro {root}\n"
            script += "" if "/tmp" in mounts else f"mount -o remount,bind,ro {root}/tmp\n"
        self.host.run(["bash", "-euc", script])

    def _line(self, mount: Mount, group: int | None) -> str:
        """The shell lines that mount a volume, whose files are written here."""
        source, target = f"{_FOLDER}/volumes/{mount.volume}", f"{_FOLDER}/root{mount.path}"
        script = ""
        if mount.files is not None:
            for name, data in mount.files.items():
                self._write(Path(source) / name, data, mount.mode, group)
        elif mount.claim:
            script += f"mkdir -p {SHARED}/{mount.claim}\nchmod 777 {SHARED}/{mount.claim}\n"
            source = f"{SHARED}/{mount.claim}"
        elif mount.memory is not None:
            script += f"mkdir -p {source}\nmountpoint -q {source} || "
            script += f"mount -t tmpfs -o size={mount.memory},mode=1777 memory {source}\n"
        else:
            script += f"mkdir -p {source}\nchmod 777 {source}\n"
        if mount.key:
            source = f"{source}/{mount.key}"
        one = mount.files is not None and mount.key != ""
        script += f"mkdir -p $(dirname {target})\ntouch {target}\n" if one else f"mkdir -p {source} {target}\n"
        script += f"mount --bind {source} {target}\n"
        return script + (f"mount -o remount,bind,ro {target}\n" if mount.read_only else "")

    def _write(self, path: Path, data: bytes, mode: int, group: int | None = None) -> None:
        """Write a file of the host through the root folder of its processes, so that none is on a disk."""
        outside = self.host.root / path.relative_to("/")
        outside.parent.mkdir(parents=True, exist_ok=True)
        outside.write_bytes(data)
        outside.chmod(mode if group is None else mode | 0o440)
        os.chown(outside, 0, 0 if group is None else group)
