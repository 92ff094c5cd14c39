"""What a Ray Train worker runs.

Ray's controller and the heartbeat's monitor import this package too. So that they start quickly, nothing here imports
torch before a worker does, and the work is named in place of being pickled.
"""

from __future__ import annotations

import importlib
import os
import socket
from typing import Any

from distrec.config.paths import REMOTE
from distrec.config.run import RunConfig
from distrec.config.tree import decode
from distrec.errors import InputError, Interrupted


def ray_worker(payload: dict[str, Any]) -> None:
    """Run the work that a payload names, on one worker of Ray Train.

    Args:
        payload: `config`, the run config as a mapping; `work`, the function as "module:name"; `arguments`, its further
            arguments by name; `monitor`, the handle of the heartbeat's monitor.
    """
    import ray.train

    from distrec.training.heartbeat import Heartbeat, phase

    phase("imports")
    with Heartbeat(payload["monitor"], ray.train.get_context().get_world_rank()) as heartbeat:
        from distrec.runtime import quiet, tune_process

        quiet()
        config = decode(RunConfig, payload["config"])
        tune_process(config.train.threads)
        work = named(payload["work"])
        heartbeat.wait_until_known()
        work(config, **payload["arguments"])


def named(name: str) -> Any:
    """The function that "module:name" names."""
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def train_worker(config: RunConfig, attempt: int) -> None:
    """Train as one worker of an initialised process group.

    Args:
        config: a resolved run config.
        attempt: the number of the attempt in `run.json`, from 1.

    Raises:
        InputError: also if this host does not see the run's folder or the data as the driver does, or has not the
            memory that the workers on it certainly need.
    """
    from distrec.data.dataset import Dataset
    from distrec.methods.registry import build_method
    from distrec.parallel.world import World
    from distrec.training.heartbeat import phase
    from distrec.training.loop import fit
    from distrec.training.run_folder import RunFolder
    from distrec.training.size import check_host

    phase("restore")
    world, run = World.current(), RunFolder.of(config)
    _require_shared(config, run, attempt)
    data, here = Dataset.open(config.data, checked=True), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    check_host(config, data, build_method(config, data), world.size, here, socket.gethostname())
    try:
        fit(world, data, config, attempt)
    except Interrupted as error:
        if world.rank == 0 and run.requested() == "stop":  # the driver may not live long enough to write it
            run.note_outcome(error)
        raise


def _require_shared(config: RunConfig, run: Any, attempt: int) -> None:
    """Check that this host sees the same local folders as the driver, before anything waits for it.

    Raises:
        InputError: it does not, and the message names the key and the host.
    """
    host = socket.gethostname()
    if not config.run.storage.startswith(REMOTE) and not run.shows_attempt(attempt):
        raise InputError(
            f"key 'run.storage' is '{config.run.storage}', but host '{host}' does not see the files that the driver "
            "writes there; give a folder that all hosts share, or an s3:// prefix."
        )
    from distrec.data.storage import open_folder

    if not config.data.startswith(REMOTE) and not open_folder(config.data).exists("manifest.json"):
        raise InputError(
            f"key 'data' is '{config.data}', which is not on host '{host}'; give a folder that all hosts share, or an "
            "s3:// prefix."
        )
