"""`distrec doctor` from the command line: what it prints, its exit status, bad input, and secrets."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from distrec.cli import main
from distrec.doctor import host
from distrec.doctor.examine import as_text, as_tree
from distrec.doctor.finding import Finding, failed, not_applicable, passed
from tests.ray_head import free_ports
from tests.training import small

REPOSITORY = Path(__file__).resolve().parents[2]
NAMES = [
    "packages", "lock file", "extension locks", "memory", "shared memory", "threads", "open files", "interfaces",
    "Ray's disk", "storage", "storage's clock", "room for checkpoints", "dashboard", "head's clock", "token",
    "Ray version", "jobs", "head", "hosts",
]  # fmt: skip


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "GLOO_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)


def examined(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    """The exit status and the printed checks, by name."""
    status = main(["doctor", "--json", *arguments])
    tree = json.loads(capsys.readouterr().out)
    assert tree.keys() == {"checks", "failed"}
    assert [one["name"] for one in tree["checks"]] == NAMES
    for one in tree["checks"]:
        assert one.keys() == {"name", "state", "found", "remedy"}
        assert one["state"] in ("passed", "failed", "not applicable")
        assert isinstance(one["found"], str)
        assert (one["remedy"] is not None) == (one["state"] == "failed")
    assert tree["failed"] == sum(one["state"] == "failed" for one in tree["checks"])
    assert status == (1 if tree["failed"] else 0)
    return status, {one["name"]: one for one in tree["checks"]}


def test_without_arguments_this_machine_is_examined(capsys: pytest.CaptureFixture[str]) -> None:
    _, found = examined(capsys)
    assert found["packages"]["state"] == "passed"
    assert {found[name]["state"] for name in NAMES[9:]} == {"not applicable"}


def test_a_config_names_storage_threads_and_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = small.write_small(tmp_path / "data")
    config = small.write_config(tmp_path / "run.yaml", data, tmp_path / "runs")
    _, found = examined(capsys, config)
    assert found["storage"]["state"] == found["storage's clock"]["state"] == "passed"
    assert found["room for checkpoints"]["state"] == "passed"
    needed = "the run's checkpoints take 36.8 KiB"  # 4 x 98 rows x 8 columns x 3 tensors x 4 bytes
    assert needed in found["room for checkpoints"]["found"]
    status, found = examined(capsys, config, "train.threads=4096", f"run.storage={tmp_path}/run.yaml/runs")
    assert status == 1
    assert found["threads"]["state"] == found["storage"]["state"] == "failed"
    _, found = examined(capsys, config, "--storage", str(tmp_path), "data=absent")
    assert found["storage"]["found"].startswith(f"'{tmp_path}': ")
    assert "the run's checkpoints" not in found["room for checkpoints"]["found"]  # nothing is known about them


def test_the_command_with_a_failed_check_ends_with_status_1() -> None:
    (closed,) = free_ports(1)
    done = subprocess.run(
        [sys.executable, "-m", "distrec.cli", "doctor", "--address", f"http://127.0.0.1:{closed}"], cwd=REPOSITORY,
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "failed          dashboard             http://127.0.0.1:" in done.stdout
    assert "remedy: start the head with" in done.stdout
    assert done.stderr == ""


def test_a_store_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    (closed,) = free_ports(1)
    for name, value in (
        ("AWS_ENDPOINT_URL", f"http://127.0.0.1:{closed}"), ("AWS_ACCESS_KEY_ID", "planted-key"),
        ("AWS_SECRET_ACCESS_KEY", "planted-secret"), ("AWS_DEFAULT_REGION", "us-east-1"),
    ):  # fmt: skip
        monkeypatch.setenv(name, value)
    done = subprocess.run(
        [sys.executable, "-m", "distrec.cli", "doctor", "--storage", "s3://bucket/runs"], cwd=REPOSITORY,
        capture_output=True, text=True, timeout=100, check=False,  # the store's client would wait for two minutes
    )  # fmt: skip
    assert done.returncode == 1
    assert "failed          storage" in done.stdout
    assert "planted" not in done.stdout + done.stderr


def test_the_table_is_aligned_and_names_remedies() -> None:
    found = [passed("a", "good"), failed("long name", "bad", "do " + "this " * 30), not_applicable("b", "no")]
    lines = as_text(found).splitlines()
    assert lines[0] == "passed          a          good"
    assert lines[1] == "failed          long name  bad"
    assert lines[2].startswith("                           remedy: do this this")
    assert lines[-2] == "not applicable  b          no"
    assert lines[-1] == "1 failed, 1 passed, 1 not applicable"
    assert max(map(len, lines)) <= 120
    assert as_tree(found)["checks"][0] == {"name": "a", "state": "passed", "found": "good", "remedy": None}


def test_a_check_that_breaks_does_not_hide_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def breaks() -> Finding:
        raise RuntimeError("odd machine at http://user:planted@host/x\nand more")

    monkeypatch.setattr(host, "open_files", breaks)
    status, found = examined(capsys)
    assert status == 1
    assert found["open files"]["found"] == "could not be examined (RuntimeError: odd machine at http://host/x)"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["absent.yaml"], "absent.yaml"),
        (["--storage", "gs://bucket"], "neither a local path nor an s3:// URL"),
        (["--storage", "s3://user:planted@bucket/runs"], "the storage holds credentials"),
        (["--address", "head:8265"], "not an http address"),
        (["--address", "http://user:planted@head:8265"], "holds credentials"),
    ],
)
def test_bad_input(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", *arguments]) == 2
    shown = capsys.readouterr()
    assert told in shown.err
    assert shown.err.startswith("distrec doctor: ")
    assert "planted" not in shown.out + shown.err
    assert shown.out == ""


def test_a_bad_address_in_the_environment(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "auto")
    assert main(["doctor"]) == 2
    assert "variable 'RAY_API_SERVER_ADDRESS' is 'auto'" in capsys.readouterr().err


def test_the_documents_name_every_check() -> None:
    page = (REPOSITORY / "docs/usage.md").read_text().partition("\n## Doctor\n")[2].partition("\n## ")[0]
    rows = [line.split(" | ")[0].removeprefix("| ").split(", ") for line in page.splitlines() if line.startswith("| ")]
    assert [name for names in rows for name in names if name in NAMES] == NAMES
