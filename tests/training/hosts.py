"""A Ray cluster of several nodes on this machine, which tests add, drain and kill: a head without CPUs, and hosts."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest


class Hosts:
    """A cluster to which this process is connected until the block ends.

    Args:
        home: a private home folder.
    """

    def __init__(self, home: Path):
        self._home, self._stack = home, ExitStack()

    def __enter__(self) -> Hosts:
        import ray
        from ray.cluster_utils import Cluster

        patch = self._stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("HOME", str(self._home))
        patch.setenv("OMP_NUM_THREADS", "1")
        for name, value in (("initial_delay", 1000), ("period", 500), ("timeout", 500), ("failure_threshold", 3)):
            patch.setenv(f"RAY_health_check_{name}{'' if name == 'failure_threshold' else '_ms'}", str(value))
        head = {"num_cpus": 0, "object_store_memory": 100_000_000, "include_dashboard": False}
        self._cluster: Any = Cluster(initialize_head=True, head_node_args=head)
        self._stack.callback(self._cluster.shutdown)
        ray.init(self._cluster.address, log_to_driver=False)
        self._stack.callback(ray.shutdown)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def add(self, cpus: int = 1) -> Any:
        """Start a host; returns it when it has joined."""
        node = self._cluster.add_node(num_cpus=cpus, object_store_memory=100_000_000)
        self._cluster.wait_for_nodes()
        return node

    def kill(self, node: Any) -> None:
        """Kill a host without a word."""
        self._cluster.remove_node(node, allow_graceful=False)

    def drain(self, node: Any, seconds: float) -> None:
        """Announce that a host will be taken away, as `ray drain-node` does."""
        import time

        from ray._raylet import GcsClient
        from ray.core.generated import autoscaler_pb2

        reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        deadline = int((time.time() + seconds) * 1000)
        accepted, told = GcsClient(address=self._cluster.address).drain_node(node.node_id, reason, "spot", deadline)
        assert accepted, told
