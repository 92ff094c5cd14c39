"""Manifests as `kubectl kustomize` renders them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from distrec.cli import main

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ("train", "configs/alignrec/demo.yaml", "data=s3://bucket/data", "run.storage=s3://bucket/runs")
needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")


def render(folder: Path) -> list[dict[str, Any]]:
    """The objects that `kubectl apply -k` would send."""
    command = ["kubectl", "kustomize", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def written(folder: Path, *arguments: str) -> Path:
    """A new folder that `distrec manifest` has written; --memory is given, since the data is not there."""
    out = folder / "out"
    extra = () if "Job" in arguments or "--memory" in arguments else ("--memory", "8Gi")
    assert main(["manifest", *arguments, *extra, "--out", str(out)]) == 0
    return out


def one(objects: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    """The only object of a kind."""
    (found,) = (entry for entry in objects if entry["kind"] == kind)
    return found
