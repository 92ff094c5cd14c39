"""One group of Ray Train workers: starts it, watches it while it works, and says how it ended."""

from __future__ import annotations

import os
import tempfile
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from typing import Any

from distrec.cluster.capacity import Ask, current_offer, fitting
from distrec.cluster.connection import on_cluster
from distrec.config.run import RunConfig
from distrec.errors import WorkersFailed, shown
from distrec.runtime import WORKER_ENVIRONMENT
from distrec.training.heartbeat import NAMESPACE, Beat, Monitor
from distrec.training.journal import Journal
from distrec.training.policy import End, Reason, frozen, may_grow
from distrec.training.worker import ray_worker

_LOOK = 1.0  # seconds between looks at the heartbeats
_LOOK_AT_HOSTS = 2.0  # seconds between looks at the hosts: some are taken away half a minute after they say so
_LOOK_AT_ROOM = 10.0  # seconds between looks for room for more workers
_RAY_LEARNS = 3.0  # seconds for which Ray may learn that a host is gone whose connections have broken
_FEW = 16  # workers that Ray Train can ask for their state twice per second; more of them every 2 s, as by default


class Group:
    """A group of workers.

    Args:
        config: the run config.
        ask: what is asked of the cluster.
        journal: what is told about the work.
        fixed: whether no other host can join the cluster.
        workers: the number of workers.
    """

    def __init__(self, config: RunConfig, ask: Ask, journal: Journal, fixed: bool, workers: int):
        self._config, self._ask, self._journal, self._fixed = config, ask, journal, fixed
        self._workers = workers
        self._began = time.monotonic()
        self._beats: dict[int, Beat] = {}
        self._monitor: Any = None
        self._answer: Any = None  # of the monitor, on its way
        self._looked = dict.fromkeys(("beats", "hosts", "room"), self._began)
        self._asked: Reason | None = None
        self._leaving: set[str] = set()  # hosts that will be taken away, by Ray's id
        self._room = 0
        self._frozen = ""
        self._noted = False

    def run(self, work: str, arguments: Mapping[str, Any]) -> End:
        """Run the work on all workers and return how they ended.

        Args:
            work: the function that every worker calls with the config, as "module:name".
            arguments: its further arguments.
        """
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        options: dict[str, Any] = {"num_cpus": 0, "max_restarts": -1, "scheduling_strategy": here}
        if (name := self._journal.name()) is not None:  # a new one each time: the last one may be ending still
            options |= {"name": f"{name}-{uuid.uuid4().hex[:8]}", "namespace": NAMESPACE}
        self._monitor = ray.remote(Monitor).options(**options).remote()
        config, errors = self._config.model_dump(), dict[int, BaseException]()
        payload = {"config": config, "work": work, "arguments": dict(arguments), "monitor": self._monitor}
        try:
            try:
                on_cluster(lambda: self._fit(payload), self._look)
            except WorkersFailed:  # this process has lost the cluster
                raise
            except Exception as error:
                errors = _by_rank(error)
            with suppress(Exception):  # a worker may have begun and ended since the last look
                self._take(ray.get(self._monitor.read.remote(), timeout=5))
        finally:
            with suppress(Exception):
                ray.kill(self._monitor)
        gone = self._gone(errors) if errors else set()
        lost = {rank for rank, error in errors.items() if is_loss(error)}
        lost |= {rank for rank, beat in self._beats.items() if beat.node in gone}
        return End(
            errors,
            self._frozen or told(errors, self._beats, lost, gone),
            bool(lost),
            self._asked,
            taken=bool(gone & self._leaving),
            progress=self._journal.progress(),
        )

    def _fit(self, payload: dict[str, Any]) -> None:
        from ray.train import FailureConfig, ScalingConfig
        from ray.train import RunConfig as RayRunConfig
        from ray.train.torch import TorchConfig

        from distrec.cluster.ray_internals import lean_trainer

        os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"  # hosts that leave are looked at here
        if self._workers <= _FEW:
            os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
        with tempfile.TemporaryDirectory() as folder:  # for Ray's own files: nothing is reported to Ray Train
            lean_trainer(
                ray_worker,
                train_loop_config=payload,
                torch_config=TorchConfig(backend="gloo", timeout_s=int(timedelta(minutes=30).total_seconds())),
                scaling_config=ScalingConfig(
                    num_workers=self._workers, resources_per_worker={"CPU": self._config.train.cpus_per_worker}
                ),
                run_config=RayRunConfig(
                    name="group",
                    storage_path=folder,
                    failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),  # type: ignore[call-arg]
                    worker_runtime_env={"env_vars": WORKER_ENVIRONMENT},  # typed as the old config
                ),
            ).fit()

    def _look(self) -> None:
        """Called often while the workers work; looks at one thing after the other when it is time."""
        looks = (("beats", _LOOK, self._look_at_beats), ("hosts", _LOOK_AT_HOSTS, self._look_at_hosts),
                 ("room", _LOOK_AT_ROOM, self._look_at_room))  # fmt: skip
        for name, seconds, look in looks:
            if time.monotonic() - self._looked[name] >= seconds:
                with suppress(Exception):  # Ray's, while the head is busy; the next look may work
                    look()
                self._looked[name] = time.monotonic()

    def _look_at_beats(self) -> None:
        import ray

        self._answer = self._answer or self._monitor.read.remote()
        done, _ = ray.wait([self._answer], timeout=0)
        if not done:
            return
        answer, self._answer = self._answer, None
        self._take(ray.get(answer))
        still = frozen(
            {rank: beat.silent for rank, beat in self._beats.items()},
            {rank: "training" in beat.phases for rank, beat in self._beats.items()},
        )
        if still and not self._frozen:
            silent = max(self._beats[rank].silent for rank in still)
            stuck = ", ".join(who(rank, self._beats) for rank in still)
            self._frozen = f"{stuck} did not answer for {silent:.0f} s"
            self._monitor.kill_workers.remote()

    def _take(self, beats: dict[int, Beat]) -> None:
        self._beats = beats
        if not self._noted and self._trained() > 0:
            self._noted = True
            self._journal.started(start_seconds(beats, time.monotonic() - self._began))

    def _look_at_hosts(self) -> None:
        from distrec.cluster.ray_internals import draining_nodes

        nodes = {beat.node: beat.host for beat in self._beats.values()}
        leaving = {node: until for node, until in draining_nodes().items() if node in nodes}
        self._leaving |= leaving.keys()
        if leaving and self._asked is None:
            self._ask_to_end("preempted")
            hosts = ", ".join(sorted(nodes[node] for node in leaving))
            left = min(leaving.values()) - time.time()
            when = f" in {left:.0f} s" if left > 0 else ""
            self._journal.say(f"host {hosts} will be taken away{when}: saving a checkpoint")

    def _look_at_room(self) -> None:
        if self._asked is not None or self._workers == self._ask.most:
            return
        room = fitting(self._ask.cpus, current_offer(self._fixed).free)
        room = min(room, self._ask.most - self._workers)
        if room == self._room and may_grow(self._workers, self._ask.most, room, self._trained()):  # seen twice
            self._ask_to_end("resize")
            self._journal.say(f"the cluster has room for {self._workers + room} workers: saving a checkpoint")
        self._room = room

    def _gone(self, errors: Mapping[int, BaseException]) -> set[str]:
        """Those of the workers' hosts that have left the cluster, by Ray's id.

        A worker sees at once that a connection breaks. If that is all there is, Ray gets time to learn why.
        """
        import ray

        nodes, gone = {beat.node for beat in self._beats.values()}, set[str]()
        until = time.monotonic() + (_RAY_LEARNS if all(map(_is_broken_link, errors.values())) else 0.0)
        with suppress(Exception):  # Ray's, if the head is gone too
            while not (gone := nodes - {node["NodeID"] for node in ray.nodes() if node["Alive"]}):
                if time.monotonic() >= until:
                    break
                time.sleep(0.2)
        return gone

    def _ask_to_end(self, reason: Reason) -> None:
        self._journal.request_stop(reason)  # first: if the storage does not answer, the next look tries again
        self._asked = reason

    def _trained(self) -> float:
        """Seconds since the last of the workers began to train; 0 if one has not yet."""
        since = [beat.phases.get("training", 0.0) for beat in self._beats.values()]
        return min(since) if len(since) == self._workers else 0.0


def start_seconds(beats: Mapping[int, Beat], whole: float) -> dict[str, float]:
    """The seconds that each phase of a group's start took, of the worker that trained last.

    Args:
        beats: what is known of each worker; all of them train.
        whole: seconds since the group began to start.
    """
    last = min(beats.values(), key=lambda beat: beat.phases["training"])
    names = sorted(last.phases, key=lambda name: -last.phases[name])
    begun = [whole - last.phases[name] for name in names]
    return dict(zip(("processes", *names), (b - a for a, b in zip([0.0, *begun], begun, strict=False)), strict=False))


def is_loss(error: BaseException) -> bool:
    """Whether a worker's process died, in contrast to raising an exception."""
    import ray

    return isinstance(getattr(error, "health_check_failure", error), ray.exceptions.RayError)


def _is_broken_link(error: BaseException) -> bool:
    """Whether a worker saw only that another one is gone."""
    return "gloo/transport" in str(error)  # as torch's messages of all such errors begin


def told(errors: Mapping[int, BaseException], beats: Mapping[int, Beat], lost: set[int], gone: set[str]) -> str:
    """What happened, as a phrase for the log.

    Args:
        errors: what each worker raised or how it died, by rank; -1 for Ray Train itself.
        beats: what was last known of each worker.
        lost: ranks of the workers whose process died.
        gone: hosts that have left the cluster, by Ray's id.
    """
    if lost and gone:
        hosts = sorted({beats[rank].host for rank in lost if rank in beats and beats[rank].node in gone})
        return f"host {', '.join(hosts)} was lost, with worker {', '.join(map(str, sorted(lost)))}"
    if lost:
        memory = any("running low on memory" in str(error) for error in errors.values())  # as Ray puts it
        why = "was killed because its host ran out of memory" if memory else "died"
        return f"{', '.join(who(rank, beats) for rank in sorted(lost))} {why}"
    if not errors:
        return ""
    rank, error = next(iter(errors.items()))
    text = shown(str(error).strip().partition("\n")[0], 200, quoted=False)
    return f"{who(rank, beats)} failed with {type(error).__name__}: {text}"


def who(rank: int, beats: Mapping[int, Beat]) -> str:
    """A worker for a message; -1 stands for Ray Train itself."""
    if rank < 0:
        return "Ray Train"
    beat = beats.get(rank)
    return f"worker {rank}" if beat is None else f"worker {rank} (process {beat.process} on host {beat.host})"


def _by_rank(error: Exception) -> dict[int, BaseException]:
    """What each worker raised; -1 stands for Ray Train itself."""
    failures = getattr(error, "worker_failures", None)
    return dict(failures) if failures else {-1: error}
