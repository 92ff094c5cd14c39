"""What a verb needs of a Kubernetes cluster: the command of its driver, its configs, and its worker pods."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distrec.config import RunConfig, commented, load_run
from distrec.config.bounds import MOST_WORKERS, check_option
from distrec.config.text import write_yaml
from distrec.config.tree import load_file
from distrec.errors import InputError, shown
from distrec.kubernetes.rules import check_config_size, whole_cpus
from distrec.methods.registry import METHODS, resolve
from distrec.submission.job import Job

_HOURS = 24.0  # a job is ended after so many hours, and those of its budget
_ENCODE_WAIT = 600.0  # seconds that `encode` waits for its workers
_ENCODE_MEMORY = "4Gi"  # both default encoders with a batch of contents take less than 2 GiB


@dataclass(frozen=True)
class Workload:
    """What runs, and on what.

    Attributes:
        verb: the verb of `distrec`.
        name: what its jobs are called, unless the user names them.
        arguments: the verb's arguments, with the paths of `files` below `folder`.
        files: the configs that the driver reads, by file name.
        least: the fewest worker pods with which it starts.
        most: the most worker pods that it uses.
        pods_reason: where these numbers come from.
        cpus: CPUs of a worker pod.
        cpus_key: the setting that decides about them.
        memory: the memory of a worker pod if it needs no plan.
        planned: the run configs whose workers must fit into a worker pod.
        wait: seconds that the driver waits for the cluster.
        wait_key: the setting that decides about it.
        hours: hours after which the job is ended.
        places: (what it is, path) of the folders and `s3://` prefixes that it reads or writes.
        mlflow: the URI of an MLflow server.
    """

    verb: str
    name: str
    arguments: list[str]
    files: dict[str, str]
    least: int
    most: int
    pods_reason: str
    cpus: int
    cpus_key: str
    wait: float
    wait_key: str
    places: list[tuple[str, str]]
    memory: str | None = None
    planned: list[RunConfig] = field(default_factory=list)
    hours: float = _HOURS
    mlflow: str | None = None


def workload(parsed: argparse.Namespace, arguments: Sequence[str], folder: str, pods: int | None) -> Workload:
    """The workload of a verb.

    Args:
        parsed: `arguments` as the verb's own parser reads them.
        arguments: the verb's arguments, without the verb.
        folder: where the driver finds its configs; "" if that is its working folder.
        pods: the most worker pods, for a verb whose config does not say.

    Raises:
        InputError: the config is invalid, holds a secret, or needs what no pod can give.
    """
    build = _VERBS.get(parsed.verb)
    if build is None:
        raise InputError(f"{shown(parsed.verb)} is no verb with a manifest; use one of {', '.join(_VERBS)}.")
    if parsed.verb != "tune" and pods is not None:
        raise InputError(
            f"option '--pods' is for 'tune'; the workers of '{parsed.verb}' are a setting of its own, so leave it out."
        )
    check_option("pods", pods, 1, MOST_WORKERS)
    job = Job.of(parsed, arguments, os.environ)
    job.check_places()
    found = build(parsed, job, folder, pods)
    check_config_size(found.files)
    return found


def _train(parsed: argparse.Namespace, job: Job, folder: str, pods: int | None) -> Workload:
    config = resolve(load_run(parsed.config, parsed.overrides))
    train = config.train
    if not train.most_workers:
        raise InputError(
            "key 'train.workers' is 0, which trains in the driver, and the driver of a job has no CPUs for work; give "
            "1 or more."
        )
    return Workload(
        verb="train",
        name=job.name,
        arguments=[_at(folder, "run.yaml")],
        files={"run.yaml": commented(config, method=METHODS[config.method["name"]].Config)},
        least=train.least_workers,
        most=train.most_workers,
        pods_reason=f"train.workers is {train.workers}, with one worker in each pod",
        cpus=whole_cpus(train.cpus_per_worker, "train.cpus_per_worker"),
        cpus_key="train.cpus_per_worker",
        wait=train.wait_for_cluster,
        wait_key="train.wait_for_cluster",
        places=job.places,
        planned=[config],
        mlflow=config.tracking.mlflow,
    )


def _tune(parsed: argparse.Namespace, job: Job, folder: str, pods: int | None) -> Workload:
    from distrec.tuning.entries import resolve_entries
    from distrec.tuning.space import Range
    from distrec.tuning.sweep import load_sweep

    sweep = load_sweep(parsed.config, parsed.overrides)
    entries = resolve_entries(sweep)
    files, methods = {}, {}
    for label, section in sweep.methods.items():
        name = f"method-{label}.yaml"
        files[name] = write_yaml(load_file(section.config))
        space = {
            key: values.model_dump() if isinstance(values, Range) else values
            for key, values in entries[label].space.items()
        }
        methods[label] = section.model_copy(update={"config": _at(folder, name), "spaces": [], "space": space})
    changed: dict[str, Any] = {"methods": methods}
    if sweep.prepare is not None:
        files["prepare.yaml"] = write_yaml(load_file(sweep.prepare.config))
        changed["prepare"] = sweep.prepare.model_copy(update={"config": _at(folder, "prepare.yaml")})
    files["sweep.yaml"] = commented(sweep.model_copy(update=changed))
    resources = sweep.resources
    trial = max(resources.workers, 1)
    if pods is not None and pods < trial:
        raise InputError(f"option '--pods' is {pods}, but a trial has {trial} workers; give at least as many.")
    return Workload(
        verb="tune",
        name=job.name,
        arguments=[_at(folder, "sweep.yaml")],
        files=files,
        least=pods or trial,  # a sweep counts once, at its start, how many trials fit
        most=pods or trial,
        pods_reason=f"each trial takes {trial}; "
        + ("there are --pods of them" if pods else "one trial runs at a time"),
        cpus=whole_cpus(resources.cpus_per_worker, "resources.cpus_per_worker"),
        cpus_key="resources.cpus_per_worker",
        wait=resources.wait_for_cluster,
        wait_key="resources.wait_for_cluster",
        places=job.places,
        planned=[entry.base for entry in entries.values()],
        hours=_HOURS + (sweep.budget.hours or 0),
        mlflow=sweep.tracking.mlflow,
    )


def _encode(parsed: argparse.Namespace, job: Job, folder: str, pods: int | None) -> Workload:
    check_option("workers", parsed.workers, 1, MOST_WORKERS)  # with 0, the driver would encode, without CPUs for work
    return Workload(
        verb="encode",
        name=job.name,
        arguments=list(job.arguments),
        files={},
        least=parsed.workers,
        most=parsed.workers,
        pods_reason=f"--workers is {parsed.workers}, with one worker in each pod",
        cpus=whole_cpus(parsed.threads, "threads"),
        cpus_key="--threads",
        wait=_ENCODE_WAIT,
        wait_key="the wait of encode",
        places=job.places,
        memory=_ENCODE_MEMORY,
    )


# What a verb `pretrain` would need is one more entry.
_VERBS: dict[str, Callable[[argparse.Namespace, Job, str, int | None], Workload]] = {
    "train": _train,
    "tune": _tune,
    "encode": _encode,
}


def planned_memory(configs: Sequence[RunConfig]) -> str:
    """The memory of a worker pod: what `distrec plan` says, a quarter more, and 1.5 GiB for Ray's processes and store.

    Raises:
        InputError: the data of a config cannot be read from here.
    """
    from distrec.sizing import worker_bytes

    try:
        most = max(worker_bytes(config) for config in configs)
    except InputError as error:
        raise InputError(
            f"{str(error).rstrip('.')}; or give the memory of a worker's pod, such as --memory 8Gi."
        ) from None
    return f"{math.ceil(1.25 * most / 2**30 + 1.5)}Gi"


def _at(folder: str, file: str) -> str:
    return str(Path(folder) / file)
