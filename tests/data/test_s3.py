"""What a client does while an object store is ill, through a proxy that makes it so (`tests/faulty_s3.py`)."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from distrec.data import s3 as client
from distrec.data import storage
from distrec.data.parquet import open_parquet, parquet_bytes
from distrec.data.storage import Folder, open_folder
from distrec.errors import InputError, StorageError, StorageFull
from distrec.training.attempts import writing_to
from tests.faulty_s3 import FaultyS3

pytestmark = pytest.mark.multiprocess

PART = 5 << 20  # bytes: the least that the protocol allows, in place of `client.BLOCK`
BIG = 7 << 20  # bytes: two parts
BUSY = {"answer": 503, "code": "SlowDown"}


@pytest.fixture
def folder(faulty_s3: FaultyS3, monkeypatch: pytest.MonkeyPatch) -> Folder:
    """A folder in an empty bucket behind the healthy proxy, with one small and one Parquet file."""
    monkeypatch.setattr(client, "BLOCK", PART)
    monkeypatch.setattr(storage, "_SINGLE", PART)
    folder = open_folder(f"{faulty_s3.bucket}/runs/one")
    folder.write_bytes(b"content", "small")
    folder.write_bytes(parquet_bytes(pa.table({"n": range(100_000)}), row_group_rows=10_000), "table")
    faulty_s3.heal()
    return folder


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that gives up after one second."""
    monkeypatch.setattr(client, "PATIENCE", 1.0)
    monkeypatch.setattr(client, "SILENCE", 0.05)
    monkeypatch.setattr(client, "_OUTAGE", client._Outage())


def upload(folder: Folder, name: str = "big", size: int = BIG) -> None:
    """Write a file in two parts, piece by piece."""
    with folder.writing(name) as file:
        for start in range(0, size, 1 << 20):
            file.write(bytes([start >> 20]) * min(1 << 20, size - start))


def check_big(folder: Folder) -> None:
    assert folder.size("big") == BIG
    content = folder.read_bytes("big")
    assert content[:: 1 << 20] == bytes(range(BIG >> 20))


READS: dict[str, Callable[[Folder], Any]] = {
    "read_bytes": lambda folder: folder.read_bytes("small"),
    "open": lambda folder: folder.open("small").read(),
    "sha256": lambda folder: folder.sha256("small"),
    "exists": lambda folder: folder.exists("small"),
    "names": lambda folder: folder.names(),
    "is_file": lambda folder: folder.folder("small").is_file(),
    "size": lambda folder: folder.size("small"),
    "remove": lambda folder: folder.remove("small"),
}
WRITES: dict[str, Callable[[Folder], Any]] = {
    "write_bytes": lambda folder: folder.write_bytes(b"x", "new"),
    "create": lambda folder: folder.create(b"x", "created"),
    "writing": upload,
}


@pytest.mark.parametrize(
    "fault",
    [
        {"answer": 503, "code": "SlowDown"}, {"answer": 500}, {"answer": 429, "code": "TooManyRequests"},
        {"answer": 400, "code": "RequestTimeout", "kinds": ["GetObject", "PutObject", "UploadPart"]}, {"reset": True},
    ],
    ids=["503", "500", "429", "400", "reset"],
)  # fmt: skip
def test_a_store_that_recovers_costs_time_only(folder: Folder, faulty_s3: FaultyS3, fault: dict[str, Any]) -> None:
    def during(call: Callable[[Folder], Any]) -> Any:
        faulty_s3.heal()
        faulty_s3.fault(**fault, first=2)
        result = call(folder)
        assert faulty_s3.counts()[f"fault {next(iter(fault))}"] == 2
        return result

    assert during(READS["read_bytes"]) == b"content"
    during(WRITES["write_bytes"])
    assert during(WRITES["create"])
    during(WRITES["writing"])
    assert folder.names() == ["big", "created", "new", "small", "table"]
    check_big(folder)


def test_a_stall_beyond_the_limit_costs_time_only(
    folder: Folder, faulty_s3: FaultyS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client.S3, "read_timeout", 3)
    client.S3.clear_instance_cache()
    survive(folder, faulty_s3, {"stall": 30, "seconds": 4})


def survive(folder: Folder, faulty_s3: FaultyS3, fault: dict[str, Any]) -> None:
    """Read and write in every way at once while a fault lasts."""
    faulty_s3.fault(**fault)
    failures: list[BaseException] = []

    def attempt(call: Callable[[Folder], Any]) -> None:
        try:
            call(open_folder(str(folder)))
        except BaseException as error:  # shown below
            failures.append(error)

    threads = [threading.Thread(target=attempt, args=[call]) for call in [READS["read_bytes"], *WRITES.values()]]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(200)
    assert not failures
    assert time.monotonic() - began > fault["seconds"] - 1
    assert folder.names() == ["big", "created", "new", "small", "table"]
    check_big(folder)


def test_a_fraction_of_failures_is_survived(folder: Folder, faulty_s3: FaultyS3) -> None:
    faulty_s3.fault(**BUSY, fraction=0.3)
    faulty_s3.fault(reset=True, fraction=0.1)
    for number in range(20):
        folder.write_bytes(bytes([number]), "many", str(number))
    assert [folder.read_bytes("many", str(number))[0] for number in range(20)] == list(range(20))
    assert len(folder.names("many")) == 20
    counts = faulty_s3.counts()
    assert counts["fault answer"] > 5
    assert counts["fault reset"] > 0


def test_answers_that_break_off_are_asked_for_again(
    folder: Folder, faulty_s3: FaultyS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder.fs, "retries", 3)
    for fault in ({"cut": 0.5}, {"cut": 0.001}):
        for read in (
            lambda: folder.read_bytes("table"),
            lambda: folder.sha256("table"),
            lambda: open_parquet(folder, "table").read_row_group(7)["n"].to_pylist() == list(range(70_000, 80_000)),
        ):
            faulty_s3.heal()
            whole = read()
            faulty_s3.fault(**fault, first=2, kinds=["GetObject"])
            assert read() == whole
            assert faulty_s3.counts()["fault cut"] == 2
    faulty_s3.fault(cut=0.5, kinds=["GetObject"])
    with pytest.raises(StorageError, match=f"^'{folder}/table' cannot be "):
        folder.read_bytes("table")


def test_a_slow_answer_is_not_taken_for_a_stall(
    folder: Folder, faulty_s3: FaultyS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client.S3, "read_timeout", 2)
    client.S3.clear_instance_cache()
    folder.write_bytes(data := bytes(range(256)) * (3 << 10), "slow")
    faulty_s3.heal()
    faulty_s3.fault(rate=1 << 18)  # 3 seconds
    assert open_folder(str(folder)).read_bytes("slow") == data
    assert faulty_s3.counts() == {"GetObject": 1, "fault rate": 1, "key test": 1}


@pytest.mark.parametrize(
    ("fault", "what"),
    [(BUSY, "503 SlowDown"), ({"reset": True}, "Connection reset by peer"), ({"stall": 30}, "within 1 s|Timeout on")],
    ids=["503", "reset", "stall"],
)
@pytest.mark.usefixtures("impatient")
def test_patience_ends_in_a_sentence(
    folder: Folder,
    faulty_s3: FaultyS3,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    fault: dict[str, Any],
    what: str,
) -> None:
    if "stall" in fault:
        monkeypatch.setattr(client.S3, "read_timeout", 1)
        client.S3.clear_instance_cache()
        folder = open_folder(str(folder))
    faulty_s3.fault(**fault)
    for read in ("read_bytes", "exists"):
        began = time.monotonic()
        with pytest.raises(
            StorageError, match=rf"^'{folder}/small' cannot be reached \(.*({what}|503 Serv).*, for 1 s\); "
        ):
            READS[read](folder)
        assert 1 <= time.monotonic() - began < 10, "neither s3fs nor botocore multiplies the patience"
        (told,) = capsys.readouterr().err.splitlines()
        assert f"/{folder.path}/small does not answer (" in told
        assert told.endswith("trying again for up to 1 s")
    for write in WRITES.values():
        with pytest.raises(TimeoutError, match=rf"({what}|503).*, for 1 s; see whether .*'{folder}/(new|created|big)'"):
            write(folder)


@pytest.mark.usefixtures("impatient")
def test_a_store_that_is_not_there_is_named(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    client.S3.clear_instance_cache()
    with pytest.raises(StorageError, match=r"cannot be reached \(Cannot connect to host 127.0.0.1:9 .*for 1 s\)"):
        open_folder(str(folder)).names()


REFUSALS = [
    (403, "AccessDenied", "ask for the right to (list and read|write) there"),
    (403, "InvalidAccessKeyId", "the store does not know the access key"),
    (403, "SignatureDoesNotMatch", "the secret key does not belong to the access key"),
    (400, "ExpiredToken", "the credentials have expired"),
    (403, "RequestTimeTooSkewed", "the clock of this host differs from the store's by more than 15 minutes: set it"),
    (404, "NoSuchBucket", "create the bucket, or correct its name"),
]


@pytest.mark.parametrize(("status", "code", "remedy"), REFUSALS, ids=[refusal[1] for refusal in REFUSALS])
def test_what_a_wait_cannot_mend_fails_at_once_with_its_remedy(
    folder: Folder, faulty_s3: FaultyS3, status: int, code: str, remedy: str
) -> None:
    faulty_s3.fault(answer=status, code=code)
    began = time.monotonic()
    for name, read in READS.items():
        if code == "NoSuchBucket" and name in ("exists", "names", "is_file", "remove"):
            continue  # nothing is there
        with pytest.raises(StorageError, match=rf"^'{folder}.*' cannot be read \(.*{code}.*\); {remedy}.*\.$"):
            read(folder)
    for write in WRITES.values():
        with pytest.raises(OSError, match=rf"{code}.*{remedy}.*'{folder}/(new|created|big)'"):
            write(folder)
    assert time.monotonic() - began < 10, "without a wait"


def test_read_only_rights_are_told_when_the_run_starts(folder: Folder, faulty_s3: FaultyS3) -> None:
    faulty_s3.fault(answer=403, code="AccessDenied", kinds=["PutObject"])
    assert folder.read_bytes("small") == b"content"
    for write in ("write_bytes", "create"):
        told = rf"^key 'run.storage' is '{folder}', which cannot be written .*AccessDenied.*ask for the right to .*\.$"
        with pytest.raises(InputError, match=told), writing_to(str(folder)):
            WRITES[write](folder)
    assert faulty_s3.counts()["PutObject"] == 2


def test_a_full_store_is_told_and_not_asked_again(folder: Folder, faulty_s3: FaultyS3) -> None:
    faulty_s3.fault(answer=507, code="XMinioStorageFull", kinds=["PutObject"])
    with pytest.raises(
        StorageFull, match=rf"^'{folder}/new' cannot be written, because the store has no room left; 1 byt"
    ):
        folder.write_bytes(b"x", "new")
    assert faulty_s3.counts()["PutObject"] == 1


def uploads(folder: Folder) -> list[str]:
    bucket = folder.path.partition("/")[0]
    return sorted(
        upload["Key"] for upload in folder.fs.call_s3("list_multipart_uploads", Bucket=bucket).get("Uploads", [])
    )


def test_a_writer_that_fails_leaves_no_file_and_no_parts(folder: Folder, faulty_s3: FaultyS3) -> None:
    folder.write_bytes(b"old", "big")

    def stop(size: int) -> None:
        with folder.writing("big") as file:
            file.write(bytes(size))
            raise KeyError

    for size in (10, BIG):
        with pytest.raises(KeyError):
            stop(size)
    faulty_s3.fault(answer=403, code="AccessDenied", kinds=["CompleteMultipartUpload"])
    with pytest.raises(PermissionError):
        upload(folder)
    faulty_s3.fault(answer=403, code="AccessDenied", kinds=["UploadPart"])
    with pytest.raises(PermissionError):
        folder.write_bytes(bytes(BIG), "big")
    assert folder.read_bytes("big") == b"old"
    assert uploads(folder) == []
    assert faulty_s3.counts()["AbortMultipartUpload"] == 3


@pytest.mark.usefixtures("impatient")
def test_stale_parts_are_removed_when_a_run_starts(folder: Folder, faulty_s3: FaultyS3) -> None:
    faulty_s3.fault(**BUSY, kinds=["UploadPart"])
    with pytest.raises(TimeoutError):
        upload(folder)
    faulty_s3.heal()
    for name in ("runs/one-more/x", "runs/onex"):
        bucket = folder.path.partition("/")[0]
        folder.fs.call_s3("create_multipart_upload", Bucket=bucket, Key=name)
    assert uploads(folder) == ["runs/one-more/x", "runs/one/big", "runs/onex"]
    assert folder.abort_uploads() == 1
    assert uploads(folder) == ["runs/one-more/x", "runs/onex"], "another folder's"
    faulty_s3.fault(answer=403, code="AccessDenied", kinds=["ListMultipartUploads"])
    assert folder.abort_uploads() == 0


def test_lost_answers_lose_nothing(folder: Folder, faulty_s3: FaultyS3) -> None:
    faulty_s3.fault(lose=True, first=1, kinds=["CompleteMultipartUpload"])
    upload(folder)
    assert faulty_s3.counts()["CompleteMultipartUpload"] == 2
    check_big(folder)
    faulty_s3.fault(lose=True, first=1, kinds=["PutObject"])
    assert not folder.create(b"mine", "new"), "the second request finds what the first wrote"
    assert folder.read_bytes("new") == b"mine"


def test_readers_see_a_whole_file_or_none(folder: Folder) -> None:
    folder.write_bytes(b"old", "big")
    with folder.writing("big") as file:
        for _ in range(BIG >> 20):
            file.write(bytes(1 << 20))
        assert folder.read_bytes("big") == b"old"
    assert folder.size("big") == BIG


def test_a_write_holds_few_parts_in_memory(s3: str) -> None:
    program = (
        "import resource, sys; from distrec.data.storage import open_folder; folder = open_folder(sys.argv[1])\n"
        "folder.write_bytes(b'x', 'warm'); before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "piece = bytes(1 << 20)\n"
        "with folder.writing('big') as file:\n"
        "    for _ in range(192): file.write(piece)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    ran = subprocess.run([sys.executable, "-c", program, s3], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout) < 128 << 10, "KiB, of a file of 192 MiB"
    assert open_folder(s3).size("big") == 192 << 20


def test_a_client_crosses_to_other_processes(folder: Folder) -> None:
    again = pickle.loads(pickle.dumps(folder))
    assert isinstance(again.fs, client.S3)
    assert again.read_bytes("small") == b"content"


def profile(home: Path, endpoint: str, key: str = "test") -> dict[str, str]:
    """An environment whose keys and endpoint are in files below `home` alone, in the profile `lab`."""
    (home / "config").write_text(f"[profile lab]\nregion = us-east-1\nendpoint_url = {endpoint}\n")
    (home / "credentials").write_text(f"[lab]\naws_access_key_id = {key}\naws_secret_access_key = secret\n")
    return {"AWS_PROFILE": "lab", "AWS_CONFIG_FILE": str(home / "config"),
            "AWS_SHARED_CREDENTIALS_FILE": str(home / "credentials")}  # fmt: skip


def without_keys(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in {**environment, "AWS_EC2_METADATA_DISABLED": "true"}.items():
        monkeypatch.setenv(name, value)
    client.S3.clear_instance_cache()


def test_a_profile_is_enough(faulty_s3: FaultyS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_keys(monkeypatch, profile(tmp_path, faulty_s3.url))
    folder = open_folder(f"{faulty_s3.bucket}/x")
    folder.write_bytes(b"1", "a")
    assert folder.read_bytes("a") == b"1"
    assert faulty_s3.counts()["PutObject"] == 1, "the profile's endpoint was asked"
    without_keys(monkeypatch, {**profile(tmp_path, faulty_s3.url), "AWS_PROFILE": "none"})
    with pytest.raises(
        StorageError, match=r"^'s3://.* cannot be reached \(The config profile \(none\) .*; set AWS_PROFILE"
    ):
        open_folder(f"{faulty_s3.bucket}/x").names()
    with pytest.raises(OSError, match=r"The config profile \(none\) could not be found; set AWS_PROFILE to .*'s3://"):
        open_folder(f"{faulty_s3.bucket}/x").write_bytes(b"1", "a")
    without_keys(monkeypatch, {"AWS_ENDPOINT_URL": faulty_s3.url})
    with pytest.raises(StorageError, match=r"cannot be reached \(Unable to locate credentials\); give an access key"):
        open_folder(f"{faulty_s3.bucket}/x").names()


def test_which_keys_are_renewed_in_a_running_process(
    faulty_s3: FaultyS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_keys(monkeypatch, profile(tmp_path, faulty_s3.url, "first"))
    folder = open_folder(f"{faulty_s3.bucket}/x")
    folder.write_bytes(b"1", "a")
    profile(tmp_path, faulty_s3.url, "second")
    assert open_folder(str(folder)).read_bytes("a") == b"1"
    assert faulty_s3.counts()["key first"] == 2, "keys in a file are read once per process"

    program = tmp_path / "keys.py"
    program.write_text(
        "import datetime, json, pathlib, sys\n"
        "until = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(minutes=5)\n"
        "key = pathlib.Path(sys.argv[1]).read_text()\n"
        "print(json.dumps({'Version': 1, 'AccessKeyId': key, 'SecretAccessKey': 's', 'SessionToken': 't',"
        " 'Expiration': until.isoformat()}))\n"
    )
    (key := tmp_path / "key").write_text("third")
    (tmp_path / "credentials").unlink()
    with open(tmp_path / "config", "a") as config:
        config.write(f"credential_process = {sys.executable} {program} {key}\n")
    client.S3.clear_instance_cache()
    assert open_folder(str(folder)).read_bytes("a") == b"1"
    key.write_text("fourth")
    assert open_folder(str(folder)).read_bytes("a") == b"1"
    counts = faulty_s3.counts()
    assert counts["key third"] == counts["key fourth"] == 1, "what expires in a few minutes is asked for again"


@pytest.mark.wide
@pytest.mark.parametrize("fault", [{**BUSY, "seconds": 60}, {"stall": 60, "seconds": 30}], ids=["503", "stall"])
def test_an_outage_as_long_as_in_the_lab(folder: Folder, faulty_s3: FaultyS3, fault: dict[str, Any]) -> None:
    survive(folder, faulty_s3, fault)
