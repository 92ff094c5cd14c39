"""The dense module under DeepSpeed against plain PyTorch, for ZeRO 0 to 3, and a state passed between the stages."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from distrec.config.run import DenseSection, OptimizerSection
from distrec.parallel.partition import share
from distrec.parallel.world import World
from distrec.runtime import quiet
from tests.distributed import run_workers
from tests.training.small_net import net

RULES: list[dict[str, Any]] = [
    {"name": "adam", "lr": 1e-2, "betas": [0.8, 0.99], "weight_decay": 0.05},
    {"name": "adamw", "lr": 1e-2, "weight_decay": 0.2},
    {"name": "sgd", "lr": 0.1, "weight_decay": 0.05},
]
STEPS = 4


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(11, 5, generator=generator), torch.randn(11, 3, generator=generator)


def plain(optimizer: dict[str, Any]) -> list[dict[str, torch.Tensor]]:
    """Weights, gradients and moments after each step of PyTorch's optimizer on the whole batch."""
    module, history = net(), []
    rule: Any = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[optimizer["name"]]
    rule = rule(module.parameters(), foreach=False, **{key: value for key, value in optimizer.items() if key != "name"})
    for step in range(STEPS):
        x, y = batch(step)
        for group in rule.param_groups:
            group["lr"] = optimizer["lr"] * 0.5**step
        rule.zero_grad()
        (module(x) * y).sum().backward()
        rule.step()
        seen = {}
        for name, parameter in module.named_parameters():
            seen[f"{name}.grad"], seen[f"{name}.weight"] = parameter.grad.clone(), parameter.detach().clone()
            for moment in ("exp_avg", "exp_avg_sq") if optimizer["name"] != "sgd" else ():
                seen[f"{name}.{moment}"] = rule.state[parameter][moment].clone()
        history.append(seen)
    return history


def compare(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], where: str) -> None:
    for name, value in found.items():
        torch.testing.assert_close(
            value, wanted[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}, {where}: {m}"
        )


def engine(optimizer: dict[str, Any], stage: int) -> Any:
    from distrec.training.dense import DenseEngine

    return DenseEngine(World.current(), net(), OptimizerSection(**optimizer), DenseSection(zero_stage=stage))


def everything() -> None:
    quiet()
    world = World.current()
    low, high = share(11, world.rank, world.size)
    for optimizer in RULES:
        history = plain(optimizer)
        carried: tuple[dict[str, torch.Tensor], int] | None = None
        for stage in (0, 1, 2, 3, 0) if world.size > 1 else (0, 1, 2, 3):
            where = f"{optimizer}, ZeRO {stage}, {world.size} workers"
            dense = engine(optimizer, stage)
            initial = {f"{name}.weight": value.detach() for name, value in net().named_parameters()}
            compare({key: value for key, value in dense.state().items() if key in initial}, initial, where)
            assert dense.steps == 0
            # Each stage starts from the state that the previous one had after its first step.
            start = 0
            if carried is not None:
                dense.load(carried[0])
                dense.steps = carried[1]
                compare(dense.state(), history[0], f"loaded, {where}")
                start = 1
            for step in range(start, STEPS):
                x, y = batch(step)
                dense.backward((dense(x[low:high]) * y[low:high]).sum())
                gradients = {f"{name}.grad": value for name, value in dense.gradients().items()}
                assert len(gradients) == 4
                compare(gradients, history[step], f"step {step}, {where}")
                dense.step(optimizer["lr"] * 0.5**step)
                state = dense.state()
                assert state.keys() == {key for key in history[step] if not key.endswith(".grad")}
                compare(state, history[step], f"step {step}, {where}")
                assert dense.steps == (0 if optimizer["name"] == "sgd" else step + 1)
                if step == 0:
                    carried = {key: value.clone() for key, value in state.items()}, dense.steps


def without_a_module() -> None:
    from distrec.training.dense import DenseEngine

    dense = DenseEngine(World(0, 1), None, OptimizerSection(), DenseSection())
    weight = torch.ones(3, requires_grad=True)
    dense.backward((weight * 2).sum())
    assert weight.grad.tolist() == [2, 2, 2]
    dense.step(0.1)
    assert dense.state() == dense.gradients() == {}
    dense.load({})
    assert dense.steps == 0


@pytest.mark.multiprocess
@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_stage_steps_as_pytorch_does_and_loads_the_state_of_another(size: int):
    run_workers(everything, size, timeout=400)


def test_a_method_without_a_module_has_a_plain_backward_pass():
    without_a_module()
