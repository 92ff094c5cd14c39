"""What distrec needs to know about a Ray cluster and Ray has no public function for.

`tests/cluster/test_ray_internals.py` notices when a new version of Ray changes one of these.
"""

from __future__ import annotations

from typing import Any

import ray

TRAIN_WORKER = "RayTrainWorker"  # in the command line of each worker of Ray Train

_State = Any  # Ray's state accessor has no public type


def _state() -> _State:
    return ray._private.state.state


def free_cpus() -> dict[str, float]:
    """The CPUs that nobody has reserved, by node id."""
    return {node: float(free.get("CPU", 0)) for node, free in _state().available_resources_per_node().items()}


def draining_nodes() -> dict[str, float]:
    """The nodes that will be taken away, by id, with the time in seconds since the epoch; 0: the time is not known."""
    return {node: deadline / 1000 for node, deadline in _state().get_draining_nodes().items()}


def node_types() -> list[float] | None:
    """The CPUs of each kind of node that the cluster's autoscaler may start; None without an autoscaler."""
    config = _state().get_cluster_config()
    if config is None or not config.node_group_configs:
        return None
    return [float(group.resources.get("CPU", 0)) for group in config.node_group_configs if group.max_count != 0]


def lean_trainer(*arguments: Any, **options: Any) -> Any:
    """A `TorchTrainer` without two of its helpers, each of which is one more process for every start of workers.

    One hands out shards of Ray's datasets, which are not used here, and makes every worker import `ray.data`. The other
    removes reservations of CPUs after its controller was killed; they also end with the driver.
    """
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

    class LeanTrainer(TorchTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            unused = (DatasetsCallback, PlacementGroupCleanerCallback)
            callbacks: list[Any] = super()._create_default_callbacks()  # type: ignore[misc]  # typed as the old trainer
            return [callback for callback in callbacks if not isinstance(callback, unused)]

    return LeanTrainer(*arguments, **options)
