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
