"""What is taken from inside DeepSpeed is there and means what is assumed, under every ZeRO stage and precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from distrec.config.run import DenseSection, OptimizerSection
from distrec.parallel.world import World
from distrec.runtime import quiet
from tests.distributed import run_workers
from tests.training.small_net import net

CASES = [(stage, "fp32") for stage in (0, 1, 2, 3)] + [(stage, "bf16") for stage in (1, 2, 3)]
LR, KEPT = 1e-2, 0.9  # of the first moment


def values(tensors: Any) -> torch.Tensor:
    """All elements but the zeros, with which partitions are padded, in order of size."""
    flat = torch.cat([tensor.detach().flatten() for tensor in tensors])
    return flat[flat != 0].sort().values


def look(stage: int, precision: str) -> dict[str, Any]:
    from distrec.training.deepspeed_internals import master_weights, partitioned_gradients, pytorch_optimizer
    from distrec.training.dense import DenseEngine

    optimizer = OptimizerSection(name="adam", lr=LR, betas=[KEPT, 0.999])
    dense = DenseEngine(World.current(), net(), optimizer, DenseSection(zero_stage=stage, precision=precision))
    engine = dense._engine
    start, rule, masters = dense.state(), pytorch_optimizer(engine), master_weights(engine)
    x = torch.randn(11, 5, generator=torch.Generator().manual_seed(1))
    dense.backward(dense(x).square().sum())
    public = dense.gradients()
    out: dict[str, Any] = {
        "rule": type(rule).__name__,
        "dtypes": {master.dtype for master in masters},
        "masters": values(masters),
        "weights": values(value for name, value in start.items() if name.endswith("weight")),
        "moments before a step": [value.abs().max() for name, value in start.items() if ".exp_avg" in name],
        "public gradients": values(public.values()),
    }
    if stage:
        gradients = partitioned_gradients(engine)
        out["gradients"] = values(gradients)
        for grad in gradients:
            grad.mul_(2)
    dense.step(LR)
    factor = (2 if stage else 1) * (1 - KEPT)
    end = dense.state()
    out["first moments"] = {name: (end[f"{name}.exp_avg"], factor * grad) for name, grad in public.items()}
    out["same masters"] = all(one is other for one, other in zip(masters, master_weights(engine), strict=True))
    out["steps"] = [float(rule.state[master]["step"]) for master in masters]
    out["moved"] = all(not torch.equal(end[name], value) for name, value in start.items())
    return out


def all_cases() -> dict[Any, Any]:
    quiet()
    return {case: look(*case) for case in CASES} | {"collectives": collectives()}


def collectives() -> tuple[bool, bool]:
    """Whether DeepSpeed knows its shared-memory collectives by name, and whether it would build them."""
    import deepspeed.ops
    from deepspeed.comm.torch import build_shm_op

    return "deepspeed_shm_comm" in deepspeed.ops.__compatible_ops__, build_shm_op() is not None


@pytest.fixture(scope="module")
def found() -> dict[Any, Any]:
    return dict(run_workers(all_cases, 1)[0])


@pytest.mark.multiprocess
@pytest.mark.parametrize("case", CASES, ids=str)
def test_optimizer_master_weights_and_gradients_are_where_they_are_looked_for(found: Any, case: tuple[int, str]):
    seen = found[case]
    assert seen["rule"] == "Adam"
    assert seen["dtypes"] == {torch.float32}
    assert torch.equal(seen["masters"], seen["weights"]), "they hold every weight once"
    assert seen["moments before a step"] == [0] * 8, "known by the parameter's name before the first step"
    if case[0]:
        assert torch.equal(seen["gradients"], seen["public gradients"])
    for name, (moment, wanted) in seen["first moments"].items():
        torch.testing.assert_close(moment, wanted, msg=lambda text, name=name: f"{name} did not step by it: {text}")
    assert seen["same masters"]
    assert set(seen["steps"]) == {1}
    assert seen["moved"]


@pytest.mark.multiprocess
def test_the_shared_memory_collectives_are_known_by_name_and_left_out(found: Any):
    assert found["collectives"] == (True, False)
