"""Faults that meet a run on the hosts of a lab, and what is recorded of each. Tests and a benchmark use this table."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tests.lab import observe
from tests.lab.clock import fast_clock, lacks_compiler
from tests.lab.cluster import ENDED, WORKERS, Cluster
from tests.lab.hosts import SHARED, Host, wait_until
from tests.lab.observe import TRAINER, Observer, Place, Record
from tests.lab.site import DATA, RUNS, distrec

CONFIG = "configs/alignrec/demo.yaml"
EPOCHS, STEPS, LR = 10, 16, 1e-2  # of a run; steps are per epoch
SETTINGS = (f"data={DATA}", f"train.epochs={EPOCHS}", "train.checkpoint_every=4", "tracking.tensorboard=false")
LONG = 40  # epochs of a run that is long enough to grow
_READY = 2  # epochs before the fault


class Disk:
    """The disk that all hosts share, as the storage of runs."""

    def __init__(self, folder: Path):
        self.folder = folder

    def keys(self, prefix: str) -> list[str]:
        return sorted(
            str(path.relative_to(self.folder)) for path in (self.folder / prefix).rglob("*") if path.is_file()
        )

    def read(self, key: str) -> bytes | None:
        try:
            return (self.folder / key).read_bytes()
        except OSError:
            return None

    def write(self, key: str, data: bytes) -> None:
        (self.folder / key).write_bytes(data)

    def fetch(self, prefix: str, folder: Path) -> Path:
        shutil.copytree(self.folder / prefix, folder, dirs_exist_ok=True)
        return folder


@dataclass
class Scene:
    """A run that trains, for a fault to meet."""

    cluster: Cluster
    place: Place
    seen: Observer
    run: str
    job: str

    @property
    def hosts(self) -> list[Host]:
        """The hosts that train."""
        return sorted({host for host, _, _ in observe.trainers(self.cluster)}, key=lambda host: host.name)

    @property
    def victim(self) -> Host:
        """The last of the hosts that train."""
        return self.hosts[-1]

    def ray(self, *arguments: str) -> str:
        """Run a command of Ray's on the client host."""
        return self.cluster.lab["client"].run(["ray", *arguments], 400, check=False)

    def driver(self, number: int) -> None:
        """Send a signal to the driver of the job, without its shell."""
        for process in self.cluster.lab["head"].processes("jobs/train.py"):
            if process.command.startswith("python"):
                process.send(number)


@dataclass(frozen=True)
class Fault:
    """A fault.

    Attributes:
        name: in tables and for `--only`.
        what: in words.
        inject: what happens, two epochs after the start of the run; the time of the fault is when this is called.
        settings: more settings of the run.
        epochs: of the run.
        options: more options of `ray job submit`.
        before: called before the run is submitted.
        mend: called when the job has ended, before the same command is given again.
        again: whether the same command must be given again.
        disk: whether the run is on the disk that hosts share, not on the object store.
        lacks: what is missing for it here; None if nothing.
    """

    name: str
    what: str
    inject: Callable[[Scene], None]
    settings: tuple[str, ...] = ()
    epochs: int = EPOCHS
    options: tuple[str, ...] = ()
    before: Callable[[Cluster], None] | None = None
    mend: Callable[[Scene], None] | None = None
    again: bool = False
    disk: bool = False
    lacks: Callable[[Cluster], str | None] = lambda cluster: None


def _host_comes_back(scene: Scene) -> None:
    victim = scene.victim
    victim.power_off()
    time.sleep(30)
    victim.power_on()
    scene.cluster.start_worker(victim.name)


def _cut_for(seconds: float) -> Callable[[Scene], None]:
    def cut(scene: Scene) -> None:
        victim = scene.victim
        victim.cut()
        time.sleep(seconds)
        victim.restore()

    return cut


def _new_head(scene: Scene) -> None:
    """Lose the head's host, and start an empty head; a host whose Ray ends is started again, as Kubernetes does."""
    cluster = scene.cluster
    cluster.lab["head"].power_off()
    cluster.lab["head"].power_on()
    cluster.start_head()


def _hosts_rejoin(scene: Scene) -> None:
    """Start Ray again on every host on which it ended for lack of its head, with a limit."""
    cluster, missing = scene.cluster, set(WORKERS)
    deadline = time.monotonic() + 180
    while missing and time.monotonic() < deadline:
        for name in sorted(missing):
            if cluster.ray[name].status is not None:
                cluster.start_worker(name)
                missing.discard(name)
        if not missing - cluster.nodes().keys():
            break
        time.sleep(1)


def _drain(scene: Scene) -> None:
    """Announce, as a cloud does, that a host goes in 60 s, and end it then."""
    cluster, victim, seconds = scene.cluster, scene.victim, 60
    node = cluster.nodes()[victim.name]["nodeId"]
    deadline = time.monotonic() + seconds
    cluster.lab["head"].run(
        ["ray", "drain-node", "--address", f"{cluster.lab['head'].address}:6379", "--node-id", node,
         "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot host is taken back",
         "--deadline-remaining-seconds", str(seconds)],
        timeout=60, environment=cluster.environment,
    )  # fmt: skip
    while time.monotonic() < deadline and (job := cluster.job(scene.job)) and job.status not in ENDED:
        time.sleep(0.5)
    victim.power_off()


def _fill_disk(scene: Scene) -> None:
    folder = scene.cluster.lab.shared
    space = shutil.disk_usage(folder).free - 200_000  # less than a checkpoint takes
    with open(folder / "filler", "wb") as file:
        for _ in range(space >> 20):
            file.write(bytes(1 << 20))


def _empty_disk(scene: Scene) -> None:
    (scene.cluster.lab.shared / "filler").unlink(missing_ok=True)


def _truncate_newest(scene: Scene) -> None:
    newest = sorted(key for key in scene.place.keys(f"runs/{scene.run}/checkpoints/") if "/rows-00000" in key)[-1]
    data = scene.place.read(newest) or b""
    scene.cluster.storage.write(newest, data[: len(data) // 2])


def _storage(**fault: object) -> Callable[[Scene], None]:
    def inject(scene: Scene) -> None:
        scene.cluster.storage.fault(**fault)

    return inject


def _wrong_clock(cluster: Cluster) -> None:
    """Start one host's Ray again under a clock that is 20 minutes fast."""
    restart(cluster, cluster.lab["w1"], fast_clock(cluster.lab, 1200))


def _no_proxy(cluster: Cluster) -> str | None:
    return None if cluster.storage.proxy else "tests/faulty_s3.py is not there"


def _no_compiler(cluster: Cluster) -> str | None:
    return lacks_compiler()


def _no_elastic(cluster: Cluster) -> str | None:
    from distrec.config.run import TrainSection

    try:
        TrainSection.model_validate({"workers": [1, 3]})
    except ValueError:
        return "train.workers takes no [min, max]"
    return None


FAULTS = (
    Fault("worker-killed", "`kill -9` of a worker process", lambda scene: _kill(scene, TRAINER)),
    Fault("raylet-killed", "`kill -9` of a host's raylet", lambda scene: _kill(scene, "/raylet/raylet ")),
    Fault("host-off", "a host loses power; another one is free", lambda scene: scene.victim.power_off()),
    Fault(
        "host-off-none-free", "a host loses power, none is free, it is back after 30 s", _host_comes_back,
        ("train.workers=3",),
    ),
    Fault("cut-20s", "a host's network is cut for 20 s", _cut_for(20)),
    Fault("cut", "a host's network is cut for good", lambda scene: scene.victim.cut()),
    Fault("worker-frozen", "a worker process is frozen for good", lambda scene: _freeze(scene)),
    Fault("head-off", "the head loses power; new head, same command", _new_head, mend=_hosts_rejoin, again=True),
    Fault("stop", "`ray job stop`, then the same command", lambda scene: _stop(scene), again=True),
    Fault(
        "stop-300s", "`ray job stop` with 300 s of grace, then the same command", lambda scene: _stop(scene),
        options=("--runtime-env-json", json.dumps({"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "300"}})), again=True,
    ),
    Fault(
        "sigterm", "SIGTERM to the driver, then the same command", lambda scene: scene.driver(signal.SIGTERM),
        again=True,
    ),
    Fault("drained", "a host is drained with a deadline of 60 s, then off", _drain),
    Fault("disk-full", "the disk of the run is full; freed, same command", _fill_disk, mend=_empty_disk, again=True,
          disk=True),
    Fault(
        "newest-truncated", "stopped, newest checkpoint cut in half, same command",
        lambda scene: scene.driver(signal.SIGTERM), mend=_truncate_newest, again=True,
    ),
    Fault("storage-stalls", "the storage does not answer for 30 s", _storage(stall=30, seconds=30), lacks=_no_proxy),
    Fault("storage-503", "the storage answers 503 for 30 s", _storage(answer=503, code="SlowDown", seconds=30),
          lacks=_no_proxy),
    Fault("storage-resets", "the storage resets every second connection for 30 s",
          _storage(reset=True, seconds=30, fraction=0.5), lacks=_no_proxy),
    Fault("clock", "a host's clock is 20 minutes fast", lambda scene: None, ("train.workers=3",), before=_wrong_clock,
          lacks=_no_compiler),
    Fault("elastic", "[1, 3] workers: a host loses power and is back after 30 s", _host_comes_back,
          ("train.workers=[1,3]", f"train.epochs={LONG}"),
          epochs=LONG, lacks=_no_elastic),
)  # fmt: skip
BY_NAME = {fault.name: fault for fault in FAULTS}


def _kill(scene: Scene, pattern: str) -> None:
    scene.victim.kill(pattern)


def _freeze(scene: Scene) -> None:
    scene.victim.freeze(TRAINER)


def _stop(scene: Scene) -> None:
    scene.ray("job", "stop", scene.job, "--address", scene.cluster.url)


class Undisturbed:
    """Runs that meet no fault, in one process, to compare others with.

    Args:
        folder: where copies of them are kept.
    """

    def __init__(self, cluster: Cluster, folder: Path):
        self._cluster, self._folder = cluster, folder

    def run(self, epochs: int = EPOCHS) -> Path:
        """The folder of a run of so many epochs."""
        name = f"undisturbed-{epochs}"
        if not (self._folder / name).exists():
            own = (f"train.epochs={epochs}", f"run.storage={RUNS}", f"run.name={name}", "train.workers=0")
            distrec(self._cluster, "train", CONFIG, *SETTINGS, *own)
            self._cluster.storage.fetch(f"runs/{name}", self._folder / name)
        return self._folder / name


def meet(
    cluster: Cluster, fault: Fault, undisturbed: Undisturbed, folder: Path, run: str, limit: float = 300
) -> Record:
    """Train a run, let it meet a fault, and record what comes of it. The cluster is whole again at the end.

    Args:
        undisturbed: runs to compare with.
        folder: a new folder for a copy of the run.
        run: the name of the run, which no other has.
        limit: seconds that each submission may take.
    """
    record = Record(fault.name)
    place: Place = Disk(cluster.lab.shared) if fault.disk else cluster.storage
    storage = f"{SHARED}/runs" if fault.disk else RUNS
    arguments = ("python", "jobs/train.py", CONFIG, *SETTINGS, *fault.settings)
    entrypoint = (*arguments, f"run.storage={storage}", f"run.name={run}")
    if fault.before:
        fault.before(cluster)
    seen = Observer(cluster, place, run, job=run)
    scene = Scene(cluster, place, seen, run, run)
    try:
        cluster.submit(run, *entrypoint, wait=False, options=fault.options).wait(120)
        seen.start()
        wait_until(lambda: seen.epochs() >= _READY or _ended(cluster, scene.job), 240, f"{run}: epoch {_READY}")
        old = {pid for _, pid, _ in observe.trainers(cluster)}
        assert old, f"{run} does not train:\n{cluster.job_log(run)[-3000:]}"
        at = time.time()
        fault.inject(scene)
        record.outcome.append(_outcome(cluster, scene.job, limit))
        if fault.again:
            if fault.mend and fault.mend is not _hosts_rejoin:
                fault.mend(scene)
            scene.job = seen.job = f"{run}-again"
            again = time.time()
            cluster.submit(scene.job, *entrypoint, wait=False, options=fault.options).wait(120)
            if fault.mend is _hosts_rejoin:  # while the job waits for them
                fault.mend(scene)
            record.outcome.append(_outcome(cluster, scene.job, limit))
            record.resubmitted = observe.first_step(seen, again)
    finally:
        if seen.ident is not None:
            seen.stop()
        repair(cluster)
    whole = undisturbed.run(fault.epochs)
    observe.timed(record, seen, at, old)
    copy = place.fetch(f"runs/{run}", folder)
    record.rows = observe.rows(copy) if (copy / "metrics.jsonl").exists() else {}
    record.restarts = observe.restarts(copy)
    record.state = observe.difference(whole, copy, LR, fault.epochs * STEPS)
    return record


def _ended(cluster: Cluster, job: str) -> bool:
    found = cluster.job(job)
    return bool(found and found.status in ENDED)


def _outcome(cluster: Cluster, job: str, limit: float) -> str:
    """The status of a job once it has ended or its head is another one; it is stopped after `limit` seconds."""
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        found = cluster.job(job)
        if found and found.status in ENDED:
            return found.status
        if found is None and cluster.get("api/version") is not None and cluster.get(f"api/jobs/{job}") is None:
            return "LOST"  # with its head
        time.sleep(0.5)
    cluster.lab["client"].run(["ray", "job", "stop", job, "--address", cluster.url], 60, check=False)
    return f"stopped after {limit:.0f} s"


def repair(cluster: Cluster) -> None:
    """Bring every host back: cables in, Ray running, no process that trains, no fault of the storage."""
    cluster.storage.heal()
    for name in WORKERS:
        host, ray = cluster.lab[name], cluster.ray.get(name)
        if host.is_on:
            host.restore()
        if not host.is_on or ray is None or ray.status is not None or host.environment or name not in cluster.nodes():
            restart(cluster, host)
        with suppress(AssertionError):
            host.kill(TRAINER)
    cluster.wait_for(len(WORKERS))


def restart(cluster: Cluster, host: Host, environment: dict[str, str] | None = None) -> None:
    """Turn a host off and on, and start Ray on it; `environment` stays with it until the next restart."""
    host.power_off()
    host.power_on()
    host.environment = dict(environment or {})
    cluster.start_worker(host.name)
    wait_until(lambda: host.name in cluster.nodes(), 120, f"Ray on {host.name}")
