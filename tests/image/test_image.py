"""The image is what it says it is, and the demo trains in it without root, compiler and network."""

from __future__ import annotations

import json
import re
import shlex
import time
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

from tests.image.build import ROOT, Image
from tests.test_packaging import BROUGHT, CPU, DEV, PROJECT

pytestmark = [pytest.mark.image, pytest.mark.timeout(3000)]

PACKAGES = "/opt/venv/lib/python3.11/site-packages"
COMPILERS = ("gcc", "g++", "cc", "c++", "clang", "nvcc", "make", "ld", "as")

# What KubeRay 1.7 runs in a pod to see whether Ray lives there; the second one on the head only.
PROBES = (
    "wget --tries 1 -T 2 -q -O- http://localhost:52365/api/local_raylet_healthz | grep success",
    "wget --tries 1 -T 2 -q -O- http://localhost:8265/api/gcs_healthz | grep success",
)

# Every module of the product, so that none needs a package that is not there.
IMPORTS = """
import importlib, pkgutil, distrec
for module in pkgutil.walk_packages(distrec.__path__, "distrec."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
print("imported")
"""

DEMO = """
set -euo pipefail
distrec demo-data --out build/demo/shop
distrec prepare configs/data/demo.yaml --source build/demo/shop --out build/demo/data
distrec encode build/demo/data
distrec train configs/alignrec/demo.yaml
distrec evaluate build/demo/runs/alignrec-demo
"""


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]):
    """Prints a line that is seen although the test passes."""

    def say(line: str) -> None:
        with capsys.disabled():
            print(f"\n{line}")

    return say


def test_it_says_what_it_is(image: Image) -> None:
    config = image.config()
    assert config["User"] == "1000"
    assert config["Cmd"] == ["distrec", "--help"]
    assert not config["Entrypoint"]  # operators run `ray start …` in it
    labels = {name.rpartition(".")[2]: value for name, value in config["Labels"].items() if "buildah" not in name}
    assert PROJECT["description"].startswith(labels.pop("description"))
    assert labels == {
        "title": PROJECT["name"], "version": PROJECT["version"], "licenses": PROJECT["license"], "lock": "cpu"
    }  # fmt: skip


def test_nothing_of_the_building_machine_is_in_it(image: Image) -> None:
    names = {line.partition("=")[0] for line in image.config()["Env"]}
    assert names == {"PATH", "PYTHONUNBUFFERED", "RAY_USAGE_STATS_ENABLED"}
    assert (image.files / "etc/pip.conf").read_text() == ""  # the place of a mount
    assert not list((image.files / "wheels").iterdir())
    assert not (image.files / "root/.cache").exists()
    assert not (image.files / "app").exists()


def test_it_is_not_root_and_has_no_compiler(image: Image) -> None:
    assert image.run("id -u; id -g; echo ~; touch ~/mine", 60).split() == ["1000", "1000", "/home/distrec"]
    found = image.run(f"for name in {' '.join(COMPILERS)}; do command -v $name || true; done", 60)
    assert not found
    assert image.run("command -v wget bash", 60).split() == ["/usr/bin/wget", "/usr/bin/bash"]
    assert image.run("touch /opt/venv/mine 2>/dev/null || echo refused", 60) == "refused\n"


def test_it_holds_the_lock_and_this_code(image: Image) -> None:
    listed = json.loads(image.run("pip list --format json --disable-pip-version-check", 120))
    packages = {canonicalize_name(package["name"]): package["version"] for package in listed}
    expected = {name: str(version) for name, version in CPU.items()}
    assert expected.items() <= packages.items()
    # torch is installed before the lock and brings these, in the versions that the tests run with.
    assert {name: packages.pop(name) for name in BROUGHT} == {name: str(DEV[name]) for name in BROUGHT}
    assert packages.pop("torch").startswith("2.13.0")
    assert packages.keys() - expected.keys() == {"distrec", "pip"}

    here = {path.relative_to(ROOT): path.read_bytes() for path in (ROOT / "distrec").rglob("*.py")}
    installed = image.files / PACKAGES.lstrip("/")
    there = {path.relative_to(installed): path.read_bytes() for path in (installed / "distrec").rglob("*.py")}
    assert there == here
    assert "usage: distrec" in image.run("distrec --help", 60)
    assert image.run(f"python -c '{IMPORTS}'", 300) == "imported\n"


def test_the_demo_trains_in_it(image: Image, say) -> None:
    began = time.monotonic()
    printed = image.run(DEMO, 1500)
    say(f"image: demo data, prepare, encode, train on two Ray workers, evaluate: {time.monotonic() - began:.0f} s")
    assert "alignrec: best epoch" in printed
    run = image.files / "home/distrec/build/demo/runs/alignrec-demo"
    assert all(json.loads(line)["workers"] == 2 for line in (run / "metrics.jsonl").read_text().splitlines())
    assert run.stat().st_uid == 1000
    # Nothing was compiled: torch's extensions, which DeepSpeed builds when it first uses them, would be here.
    assert not (image.files / "home/distrec/.cache/torch_extensions").exists()


def test_probes_answer_and_fail_with_the_agent_that_they_ask(image: Image, say) -> None:
    """Of a head as on Kubernetes: KubeRay's probes and the image's own health check. Neither knows the token."""
    kind, *health = image.config()["Healthcheck"]["Test"]
    assert kind == "CMD"
    check = shlex.join(health)
    assert image.run(f"{check} && echo healthy", 60) == "healthy\n"  # no raylet runs
    began = time.monotonic()
    probes = " && ".join(f"{{ {probe}; }}" for probe in PROBES)
    printed = image.run(
        f"""
        export RAY_AUTH_MODE=token RAY_AUTH_TOKEN=of-this-test-only-0123456789abcdef
        ray start --head --num-cpus=0 --node-ip-address=127.0.0.1 --dashboard-host=0.0.0.0 \
            --object-store-memory=100000000 > log 2>&1
        for _ in $(seq 120); do if {probes}; then break; fi; sleep 1; done > probes
        cat probes
        {check} && echo healthy
        for place in /proc/[0-9]*; do
            if grep -q ^ray::DashboardA $place/comm; then kill -STOP ${{place#/proc/}} && echo frozen; fi
        done
        {check} || echo unhealthy
        """,
        300,
    )
    say(f"image: a Ray head answered its probes within {time.monotonic() - began:.0f} s")
    assert re.fullmatch(r"(success.*\n)+healthy\nfrozen\nunhealthy\n", printed), printed


def test_its_size_is_the_stated_one(image: Image, say) -> None:
    """The stand-in for `python:3.11-slim` is bigger than that, hence not counted: what `Dockerfile` adds is."""
    packages = image.files / PACKAGES.lstrip("/")
    sizes = {place.name: size(place) for place in packages.iterdir()}
    total = size(image.files / "opt/venv")
    largest = sorted(sizes, key=sizes.__getitem__, reverse=True)[:8]
    parts = ", ".join(f"{name} {sizes[name] / 1e6:.0f}" for name in largest)
    say(f"image: built in {image.built_s:.0f} s; environment {total / 1e9:.2f} GB, of which in MB: {parts}")
    (stated,) = re.findall(r"image for CPUs holds (\d\.\d) GB of packages", (ROOT / "docs/usage.md").read_text())
    assert total / 1e9 == pytest.approx(float(stated), rel=0.05)


def size(place: Path) -> int:
    """Bytes of all files below a place."""
    files = place.rglob("*") if place.is_dir() else [place]
    return sum(file.lstat().st_size for file in files if file.is_symlink() or file.is_file())
