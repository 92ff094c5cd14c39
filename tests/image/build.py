"""The image, built by buildah from `Dockerfile` as root, with no engine and no registry of images.

`python:3.11-slim` is not to be had without such a registry, so a Debian with its own Python 3.11 stands in for it. What
this machine needs to reach package registries (its certificates and pip's settings) is mounted while commands of the
build run, and is not in the image; only the empty places of the mounts are.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
STAND_IN_FILES = ROOT / "build/image/base.tar"  # kept for later builds
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
PIP_SETTINGS = ("index-url", "timeout")  # those of this machine that a build needs, too
PACKAGES = "python3,python3-pip,python3-venv,ca-certificates"
BASE, IMAGE = "localhost/python-stand-in", "localhost/distrec"
STAND_IN = """FROM scratch
ADD base.tar /
RUN ln -s /usr/bin/python3 /usr/local/bin/python3 && rm -f /usr/lib/python3*/EXTERNALLY-MANAGED
"""
# $@: a command that runs with its own process numbers and no network but loopback. They end with it.
ALONE = ("unshare", "--net", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c")
LOOPBACK = 'ip link set lo up && exec "$@"'


def lack() -> str | None:
    """What this machine lacks for building the image; None if nothing."""
    if os.geteuid() != 0:
        return "building the image needs root"
    for program in ("buildah", "mmdebstrap", "unshare", "ip"):
        if shutil.which(program) is None:
            return f"building the image needs '{program}'"
    return None


class Image:
    """The image and one container of it, in `folder`.

    `built_s` is the time that `Dockerfile` took, without the stand-in. `torch` names the build of torch as `pip` takes
    it: a requirement, with options, or the path of a wheel.
    """

    def __init__(self, folder: Path, torch: str) -> None:
        self.folder = folder
        (folder / "policy.json").write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
        (folder / "pip.conf").write_text(pip_settings())
        self._stand_in()
        wheel = self._wheel(torch)
        began = time.monotonic()
        mounts = [f"{wheel.parent}:/wheels:ro", f"{folder}/pip.conf:/etc/pip.conf:ro"]
        if CERTIFICATES.exists():
            mounts.append(f"{CERTIFICATES}:{CERTIFICATES}:ro")
        self._build(
            IMAGE, ROOT, *(f"--volume={mount}" for mount in mounts),
            f"--build-arg=BASE_IMAGE={BASE}", f"--build-arg=TORCH=/wheels/{wheel.name}",
        )  # fmt: skip
        self.built_s = time.monotonic() - began
        self._container = self.buildah("from", "--pull-never", *self._policy(), IMAGE).strip()
        self.files = Path(self.buildah("mount", self._container).strip())

    def config(self) -> dict[str, Any]:
        """What the image says of itself: user, environment, labels, command, health check."""
        config: dict[str, Any] = json.loads(self.buildah("inspect", "--type", "image", IMAGE))["Docker"]["config"]
        return config

    def run(self, script: str, seconds: float) -> str:
        """What a bash script prints in the container, as the image's user. All that it started ends with it."""
        command = self._buildah("run", "--isolation", "chroot", self._container, "--", "bash", "-c", script)
        return output([*ALONE, LOOPBACK, "sh", *command], seconds, self._environment())

    def buildah(self, *arguments: str, seconds: float = 1800) -> str:
        """What a command of buildah prints."""
        return output(self._buildah(*arguments), seconds, self._environment())

    def _stand_in(self) -> None:
        """Build what takes the place of `python:3.11-slim`."""
        if not STAND_IN_FILES.exists():
            new = self.folder / "base.tar"
            output(["mmdebstrap", "--variant=minbase", f"--include={PACKAGES}", "bookworm", str(new)], 600)
            STAND_IN_FILES.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(new, STAND_IN_FILES)
        context = self.folder / "stand-in"
        context.mkdir()
        (context / "Dockerfile").write_text(STAND_IN)
        shutil.copy(STAND_IN_FILES, context / "base.tar")
        self._build(BASE, context)
        shutil.rmtree(context)

    def _wheel(self, torch: str) -> Path:
        """The wheel of torch, from where `make env` takes it."""
        wheels = self.folder / "wheels"
        pip = (sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "--dest", str(wheels))
        output([*pip, *shlex.split(torch)], 600)
        (wheel,) = wheels.iterdir()
        return wheel

    def _build(self, tag: str, context: Path, *options: str) -> None:
        # In the other format, OCI, there are no health checks.
        general = ("--isolation", "chroot", "--pull-never", "--format", "docker", *self._policy())
        self.buildah("bud", *general, *options, "--tag", tag, str(context))

    def _policy(self) -> tuple[str, str]:
        return "--signature-policy", f"{self.folder}/policy.json"

    def _buildah(self, *arguments: str) -> list[str]:
        store = ("--root", f"{self.folder}/store", "--runroot", f"{self.folder}/run", "--storage-driver", "vfs")
        return ["buildah", *store, *arguments]

    def _environment(self) -> dict[str, str]:
        return {**os.environ, "TMPDIR": str(self.folder)}


def remove(folder: Path) -> None:
    """Delete the folder of an image, unless something of the machine, such as its devices, is still mounted in it."""
    mounted = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    within = [place for place in mounted if Path(place).is_relative_to(folder)]
    assert not within, f"still mounted: {within}"
    shutil.rmtree(folder)


def pip_settings() -> str:
    """A configuration of pip with this machine's index and certificates."""
    lines = ["[global]", *([f"cert = {CERTIFICATES}"] if CERTIFICATES.exists() else [])]
    for line in output([sys.executable, "-m", "pip", "config", "list"], 60).splitlines():
        name, _, value = line.partition("=")
        name = name.rpartition(".")[2].removeprefix("default-")
        if name in PIP_SETTINGS:
            lines.append(f"{name} = {value.strip(chr(39))}")
    return "\n".join(lines) + "\n"


def output(command: Sequence[str], seconds: float, environment: dict[str, str] | None = None) -> str:
    """The standard output of a command that must succeed within `seconds`; otherwise all that it started is killed."""
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env=environment, start_new_session=True,
    )  # fmt: skip
    try:
        printed, said = process.communicate(timeout=seconds)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    assert process.returncode == 0, f"{shlex.join(command)}\nended with {process.returncode}\n{printed}\n{said}"
    return printed
