"""A Ray cluster on the hosts of a lab, with an S3 server on its storage host."""

from __future__ import annotations

import importlib.util
import json
import shutil
import socket
import subprocess
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config

from tests.lab.hosts import REPOSITORY, Host, Lab, Started, T, wait_until

WORKERS = ("w1", "w2", "w3")
BUCKET = "lab"
KEY, SECRET = "lab-key", "planted-lab-secret"
_GCS, _DASHBOARD, _SERVER, _PROXY, _CONTROL = 6379, 8265, 9000, 9001, 9002

# A silent host is declared dead after 5 x (1 s + 1 s), which two busy cores still keep up with. Ray's own values make
# it 5 x (3 s + 10 s). Only the head reads them.
TIGHT = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "5",
}
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


@dataclass(frozen=True)
class Job:
    """A job's record at the head."""

    name: str
    status: str
    message: str


class Storage:
    """The S3 server of a lab. The hosts reach it through a proxy that injects faults; this class does not."""

    def __init__(self, host: Host):
        self._host, self._pool = host, host.pool()
        self.server: Started | None = None
        self.proxy: Started | None = None
        self._faulty = importlib.util.find_spec("tests.faulty_s3") is not None
        port = _PROXY if self._faulty else _SERVER
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://{host.address}:{port}",
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def start(self) -> None:
        """Start the server with an empty bucket `BUCKET`."""
        self.server = self._host.start(["python", "-m", "moto.server", "-H", "0.0.0.0", "-p", str(_SERVER)], "moto")
        if self._faulty:
            ports = ["--listen", f"0.0.0.0:{_PROXY}", "--upstream", f"127.0.0.1:{_SERVER}"]
            command = ["python", "-m", "tests.faulty_s3", *ports, "--control", f"0.0.0.0:{_CONTROL}"]
            self.proxy = self._host.start(command, "proxy", cwd=str(REPOSITORY))
        ports_up = [_SERVER, *([_PROXY, _CONTROL] if self._faulty else [])]
        for port in ports_up:
            until(lambda port=port: self._host.inside(lambda: answers("127.0.0.1", port)), 60, "S3 server", self.server)
        self.do(lambda s3: s3.create_bucket(Bucket=BUCKET))

    def do(self, work: Callable[[Any], T]) -> T:
        """Call `work` with an S3 client that does not pass the proxy."""
        return self._pool.submit(lambda: work(self._client())).result()

    @cache  # noqa: B019 -- one storage per lab
    def _client(self) -> Any:
        return boto3.session.Session().client(
            "s3", endpoint_url=f"http://127.0.0.1:{_SERVER}", region_name="us-east-1",
            aws_access_key_id=KEY, aws_secret_access_key=SECRET,
            config=Config(connect_timeout=5, read_timeout=20, retries={"max_attempts": 2}, proxies={}),
        )  # fmt: skip

    def keys(self, prefix: str) -> list[str]:
        """The keys that start with `prefix`, sorted."""

        def listed(s3: Any) -> list[str]:
            pages = s3.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
            return [entry["Key"] for page in pages for entry in page.get("Contents", [])]

        return self.do(listed)

    def read(self, key: str) -> bytes | None:
        """The content of an object; None if there is none."""

        def got(s3: Any) -> bytes | None:
            try:
                return bytes(s3.get_object(Bucket=BUCKET, Key=key)["Body"].read())
            except s3.exceptions.NoSuchKey:
                return None

        return self.do(got)

    def write(self, key: str, data: bytes) -> None:
        """Write an object."""
        self.do(lambda s3: s3.put_object(Bucket=BUCKET, Key=key, Body=data))

    def fetch(self, prefix: str, folder: Path) -> Path:
        """Copy the objects below `prefix` to a local folder, which is returned."""
        for key in self.keys(f"{prefix}/"):
            if key.endswith("/"):  # what marks an empty folder
                continue
            path = folder / key[len(prefix) + 1 :]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.read(key) or b"")
        return folder

    def fault(self, **settings: Any) -> None:
        """Make the proxy answer wrongly, late or not at all, as `tests.faulty_s3.Fault` says."""
        self._host.inside(lambda: http(f"http://127.0.0.1:{_CONTROL}/fault", data=json.dumps(settings)))

    def heal(self) -> None:
        """Take all faults away."""
        if self.proxy is not None:
            self._host.inside(lambda: http(f"http://127.0.0.1:{_CONTROL}/heal", data=""))


class Cluster:
    """Ray on the hosts of a lab: a head without CPUs, and workers of one CPU each.

    Args:
        head_environment: environment variables of the head's Ray processes alone, such as `TIGHT`.
        token: if given, the cluster asks for it; else for none.
    """

    def __init__(self, lab: Lab, storage: Storage, head_environment: Mapping[str, str] = TIGHT, token: str = ""):
        self.lab, self.storage, self._head_environment = lab, storage, dict(head_environment)
        self.url = f"http://{lab['head'].address}:{_DASHBOARD}"
        self.ray: dict[str, Started] = {}
        self._token = token
        access = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token} if token else {"RAY_AUTH_MODE": "disabled"}
        self.environment = {**access, **storage.environment, "GLOO_SOCKET_IFNAME": "eth0"}
        lab["client"].environment |= access

    def start(self, workers: Sequence[str] = WORKERS) -> None:
        """Start the head and `workers`, and wait for them."""
        self.start_head()
        for name in workers:
            self.start_worker(name)
        self.wait_for(len(workers))

    def start_head(self) -> None:
        """Start a head that knows no nodes and no jobs."""
        options = ["--port", str(_GCS), "--dashboard-host", "0.0.0.0", "--temp-dir", "/tmp/r"]
        self._start("head", ["--head", *options, "--num-cpus", "0"], self._head_environment)
        until(lambda: self.get("api/version") is not None, 120, "the head", self.ray["head"])

    def start_worker(self, name: str, environment: Mapping[str, str] | None = None) -> None:
        """Start Ray on a host, without waiting for it."""
        self._start(name, ["--address", f"{self.lab['head'].address}:{_GCS}", "--num-cpus", "1"], environment or {})

    def _start(self, name: str, options: Sequence[str], environment: Mapping[str, str]) -> None:
        host, fixed = self.lab[name], ["--object-store-memory", "100000000", "--disable-usage-stats", "--block"]
        command = ["ray", "start", *options, "--node-ip-address", host.address, *fixed]
        self.ray[name] = host.start(command, "ray", environment={**self.environment, **environment})

    def nodes(self) -> dict[str, dict[str, Any]]:
        """What the head says of the raylets that it holds to be alive, by host."""
        answer = json.loads(self.get("nodes?view=summary") or "{}")
        names = {host.address: name for name, host in self.lab.hosts.items()}
        raylets = [node.get("raylet", {}) for node in answer.get("data", {}).get("summary", [])]
        return {names[raylet["nodeManagerAddress"]]: raylet for raylet in raylets if raylet.get("state") == "ALIVE"}

    def wait_for(self, workers: int, timeout: float = 180) -> None:
        """Wait until just `workers` hosts beside the head are alive."""

        def there() -> bool:
            for name, started in self.ray.items():
                if started.status is not None and self.lab[name].is_on:
                    raise RuntimeError(f"Ray on {name} ended with status {started.status}:\n{started.tail()}")
            return len(self.nodes().keys() - {"head"}) == workers

        wait_until(there, timeout, f"{workers} hosts alive", every=0.5)

    def get(self, path: str) -> str | None:
        """What the head's HTTP server answers; None if nothing."""
        try:
            return self.lab["client"].inside(lambda: http(f"{self.url}/{path}", self._token))
        except OSError:
            return None

    # Jobs ----------------------------------------------------------------------------------------------------------

    def submit(self, name: str, *entrypoint: str, options: Sequence[str] = (), wait: bool = True) -> Started:
        """`ray job submit` on the client host, from its own copy of the repository. The job has the id `name`."""
        fixed = ["--address", self.url, "--working-dir", ".", "--submission-id", name]
        command = ["ray", "job", "submit", *fixed, *options, *([] if wait else ["--no-wait"]), "--", *entrypoint]
        return self.lab["client"].start(command, f"submit-{name}", "/tmp/work")

    def distrec_submit(self, log: str, *arguments: str) -> Started:
        """`distrec submit`, as README says, on the client host and from its own copy of the repository."""
        command = ["python", "-m", "distrec.cli", "submit", *arguments, "--address", self.url]
        return self.lab["client"].start(command, f"submit-{log}", "/tmp/work")

    def job(self, name: str) -> Job | None:
        """A job's record; None if the head does not answer or does not know it."""
        text = self.get(f"api/jobs/{name}")
        if text is None:
            return None
        record = json.loads(text)
        return Job(name, record["status"], record.get("message") or "")

    def job_log(self, name: str) -> str:
        """What the driver of a job has written, read from the head's disk; lines of carriage returns are kept."""
        files = sorted((self.lab["head"].tmp / "r").glob(f"session_2*/logs/job-driver-{name}.log"))
        return files[-1].read_text(errors="replace") if files else ""

    def wait_for_job(self, name: str, timeout: float) -> Job:
        """Wait until a job has ended; `TimeoutError` shows the end of its log."""

        def ended() -> Job | None:
            job = self.job(name)
            return job if job and job.status in ENDED else None

        try:
            return wait_until(ended, timeout, f"the end of job {name}", every=0.5)
        except TimeoutError as error:
            raise TimeoutError(f"{error}:\n{self.job_log(name)[-4000:]}") from None

    def done(self, name: str, submitted: Started, timeout: float) -> str:
        """Wait for `submit(name, …)`, which must succeed; returns its output."""
        status = submitted.wait(timeout)
        if status:
            raise AssertionError(f"job {name} ended with status {status}:\n{submitted.tail(80)}")
        return submitted.text()


def prepare_client(host: Host) -> None:
    """Give a host a working copy of the repository in /tmp/work, as a user has it."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=REPOSITORY, capture_output=True, check=True, timeout=30).stdout.decode()
    for name in filter(None, names.split("\0")):
        if (REPOSITORY / name).is_file():
            target = host.tmp / "work" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, target)


def until(true: Callable[[], T], timeout: float, what: str, started: Started) -> T:
    """`wait_until`, which also fails, with the end of the log, as soon as the command has ended."""

    def checked() -> T:
        if started.status is not None:
            raise RuntimeError(f"{what} ended with status {started.status}:\n{started.tail()}")
        return true()

    try:
        return wait_until(checked, timeout, what)
    except TimeoutError as error:
        raise TimeoutError(f"{error}:\n{started.tail()}") from None


def http(url: str, token: str = "", data: str | None = None) -> str:
    """The body of the answer to a GET, or to a POST with `data`."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(url, None if data is None else data.encode(), headers)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # this machine may have a proxy
    with opener.open(request, timeout=10) as response:
        return str(response.read().decode())


def answers(address: str, port: int) -> bool:
    """Whether something listens there."""
    try:
        socket.create_connection((address, port), timeout=2).close()
    except OSError:
        return False
    return True
