"""What distrec uses of Ray's internals is there and means what distrec takes it for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from distrec.cluster import ray_internals


@pytest.mark.multiprocess
def test_free_cpus_and_draining_nodes_of_a_cluster(cluster: None) -> None:
    import ray

    (node,) = [found["NodeID"] for found in ray.nodes() if found["Alive"]]
    assert ray_internals.free_cpus() == {node: 2.0}
    assert ray_internals.draining_nodes() == {}
    assert ray_internals.node_types() is None  # nobody scales this cluster
    group = ray.util.placement_group([{"CPU": 1.5}])
    assert group.wait(20)
    try:
        assert ray_internals.free_cpus() == {node: 0.5}
    finally:
        ray.util.remove_placement_group(group)


def test_node_types_are_those_that_an_autoscaler_may_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the message that an autoscaler reports; no autoscaler can run here."""
    from ray.core.generated.autoscaler_pb2 import ClusterConfig, NodeGroupConfig

    groups = [
        NodeGroupConfig(resources={"CPU": 8}, max_count=3),
        NodeGroupConfig(resources={"CPU": 64}, max_count=0),
        NodeGroupConfig(resources={"CPU": 4, "GPU": 1}, max_count=-1),
    ]
    state: Any = SimpleNamespace(get_cluster_config=lambda: ClusterConfig(node_group_configs=groups))
    monkeypatch.setattr(ray_internals, "_state", lambda: state)
    assert ray_internals.node_types() == [8.0, 4.0]


def test_the_lean_trainer_lacks_two_helpers_and_nothing_else() -> None:
    from ray.train import ScalingConfig
    from ray.train.torch import TorchTrainer

    def helpers(trainer: Any) -> list[str]:
        return [type(callback).__name__ for callback in trainer._create_default_callbacks()]

    arguments: dict[str, Any] = {"train_loop_per_worker": print, "scaling_config": ScalingConfig(num_workers=1)}
    lean, whole = helpers(ray_internals.lean_trainer(**arguments)), helpers(TorchTrainer(**arguments))
    assert [name for name in whole if name not in lean] == ["PlacementGroupCleanerCallback", "DatasetsCallback"]
    assert [name for name in lean if name not in whole] == []
