"""Checks of storage: folders and an S3 server that work, and that do not."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from distrec.data.storage import Folder, open_folder
from distrec.doctor import storage
from distrec.doctor.storage import Probe, probe, skew
from distrec.errors import InputError
from tests.faulty_s3 import FaultyS3


def test_a_folder_is_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/file").write_text("x")
    for folder in ("kept", "new/deep"):
        found = probe(str(tmp_path / folder))
        assert found.error is None
        assert storage.writable(found).state == storage.clock(found).state == "passed"
    assert [path.name for path in tmp_path.rglob("*")] == ["kept", "file"]


def test_a_folder_that_cannot_be_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    found = storage.writable(probe(str(tmp_path / "file/runs")))
    assert found.state == "failed"
    assert f"'{tmp_path}/file' is a file" in found.found
    assert found.remedy == "remove it, or give another path"


def test_a_folder_that_cannot_be_written() -> None:
    found = probe("/proc/runs")
    assert storage.writable(found).state == "failed"
    assert storage.clock(found).state == "not applicable"
    assert "'/proc/runs' cannot be written" in storage.writable(found).found


def test_a_full_disk() -> None:
    found = storage.room("/proc", None)  # has no room at all
    assert (found.state, found.found) == ("failed", "0 bytes free")


def test_room_for_checkpoints(tmp_path: Path) -> None:
    assert storage.room(str(tmp_path), 0).state == "passed"
    found = storage.room(str(tmp_path / "new"), 1 << 60)
    assert found.state == "failed"
    assert "and the run's checkpoints take 1073741824.0 GiB" in found.found
    assert storage.room(None, None).state == storage.room("s3://bucket/runs", 1 << 60).state == "not applicable"


def test_an_object_store(s3: str) -> None:
    found = probe(f"{s3}/runs")
    assert storage.writable(found).state == "passed", found
    assert storage.clock(found).state == "passed", found
    assert open_folder(f"{s3}/runs").names() == []


def test_a_bucket_that_does_not_exist(s3: str) -> None:
    found = storage.writable(probe("s3://no-such-bucket-here/runs"))
    assert found.state == "failed"
    assert "NoSuchBucket" in found.found
    assert found.remedy == "create the bucket, or correct its name"


def test_a_store_that_does_not_answer_is_not_waited_for(faulty_s3: FaultyS3, s3: str) -> None:
    faulty_s3.fault(answer=503, code="ServiceUnavailable")
    found = storage.writable(probe(f"{s3}/runs", limit=2))
    assert found.state == "failed"
    assert "no answer within 2 s" in found.found
    assert "AWS_ENDPOINT_URL" in str(found.remedy)


def test_a_store_that_gives_back_other_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Folder, "read_bytes", lambda *_: b"other")
    found = storage.writable(probe(str(tmp_path / "runs")))
    assert found.state == "failed"
    assert "does not give back what was written" in found.found
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", ["", "gs://bucket", "s3://"])
def test_what_is_no_path_is_refused(path: str) -> None:
    with pytest.raises(InputError):
        probe(path)


@pytest.mark.parametrize(
    ("there", "ahead"),
    [(100.0, 0), (102.5, 0), (99.5, 0), (98.0, -1.0), (110.0, 7.0), (3700.0, 3597.0), (0.0, -99.0)],
)
def test_the_difference_of_two_clocks_is_what_is_certain(there: float, ahead: float) -> None:
    assert skew(100.0, 103.0, there) == ahead


@pytest.mark.parametrize(
    ("ahead", "state", "told"),
    [
        (0.0, "passed", "agrees with ours"), (-59.0, "passed", "is 59 s behind ours"),
        (61.0, "failed", "is 61 s ahead of ours"), (-4000.0, "failed", "is 4,000 s behind ours"),
    ],
)  # fmt: skip
def test_a_clock_that_differs(ahead: float, state: str, told: str) -> None:
    found = storage.clock(Probe("'s3://b/runs'", skew=ahead))
    assert (found.state, found.found) == (state, f"the clock of 's3://b/runs' {told}")


def test_the_clock_of_a_store_is_read(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if ours were an hour behind; requests are signed with the true time."""
    clock = SimpleNamespace(time=lambda: time.time() - 3600, perf_counter=time.perf_counter)
    monkeypatch.setattr(storage, "time", clock)
    found = storage.clock(probe(f"{s3}/runs"))
    assert found.state == "failed"
    assert "ahead of ours" in found.found
