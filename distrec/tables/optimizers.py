"""The optimizers of exact tables: PyTorch's fused ones, and one that smooths the update of a whole table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from distrec.config.run import OptimizerSection


def build_optimizer(parameters: Iterable[torch.Tensor], config: OptimizerSection) -> torch.optim.Optimizer:
    """The optimizer of `config` over `parameters`, with its state allocated and set to zero.

    A checkpoint can therefore be loaded into the state before the first step.
    """
    parameters = list(parameters)
    if config.name == "sgd":
        return torch.optim.SGD(parameters, lr=config.lr, weight_decay=config.weight_decay, fused=True)
    rule = torch.optim.Adam if config.name == "adam" else torch.optim.AdamW
    betas = (config.betas[0], config.betas[1])
    optimizer = rule(
        parameters, lr=config.lr, betas=betas, eps=config.eps, weight_decay=config.weight_decay, fused=True
    )
    for parameter in parameters:
        optimizer.state[parameter] = {
            "step": torch.tensor(0.0),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


class SmoothedOptimizer(torch.optim.Optimizer):
    """An optimizer whose update passes through a linear map before it is applied (docs/methods/stair.md section 3.6).

    The map smooths the final direction: for Adam, the bias-corrected and normalised one. It smooths neither gradients
    nor moments nor decoupled weight decay. With the identity as the map, this is the plain optimizer.

    Args:
        smooth: for each parameter, the map of its direction, from `[rows, dim]` to the same shape. On a sharded table
            the rows are mine, and the map is collective.
    """

    def __init__(
        self,
        parameters: Sequence[torch.Tensor],
        smooth: Sequence[Callable[[torch.Tensor], torch.Tensor]],
        config: OptimizerSection,
    ):
        super().__init__(parameters, {"lr": config.lr})
        self._decay, self._decoupled = config.weight_decay, config.name == "adamw"
        self._parts: dict[torch.Tensor, _Part] = {}
        bare = config.model_copy(update={"lr": 1.0, "weight_decay": 0.0})
        for parameter, linear_map in zip(parameters, smooth, strict=True):
            change = torch.zeros_like(parameter)
            rule = build_optimizer([change], bare)
            self._parts[parameter] = _Part(change, rule, linear_map)
            self.state[parameter] = rule.state[change]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                part, grad = self._parts[parameter], parameter.grad
                if grad is None:
                    grad = torch.zeros_like(parameter)
                if self._decoupled:
                    parameter.mul_(1 - group["lr"] * self._decay)
                elif self._decay:
                    grad = grad + self._decay * parameter
                part.change.zero_()
                part.change.grad = grad
                part.rule.step()
                parameter.add_(part.smooth(part.change), alpha=group["lr"])


@dataclass(frozen=True)
class _Part:
    """What one parameter needs. The plain rule with learning rate 1 turns zeros in `change` into its direction."""

    change: torch.Tensor
    rule: torch.optim.Optimizer
    smooth: Callable[[torch.Tensor], torch.Tensor]


def moments(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    """The moments that `optimizer` keeps for `parameter`, by name and of its shape; empty for SGD."""
    return {name: value for name, value in optimizer.state[parameter].items() if name != "step"}
