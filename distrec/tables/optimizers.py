"""The optimizer rules: PyTorch's own, fused, and one that smooths the update of a whole table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from distrec.config.run import OptimizerSection


def build_optimizer(parameters: Iterable[torch.Tensor], config: OptimizerSection) -> torch.optim.Optimizer:
    """The optimizer of `config` over `parameters`, with its state already allocated (zeros).

    Allocating at once means that a checkpoint can be loaded into the state before the first step.
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
        _zero_moments(optimizer, parameter)
    return optimizer


class SmoothedOptimizer(torch.optim.Optimizer):
    """A rule whose update of a table passes through a linear map before it is written (STAIR, stair.md 3.6).

    What is smoothed is the finished direction: for Adam the bias-corrected, normalised one, neither gradient nor moments;
    decoupled weight decay is not smoothed. With the identity as map it is the plain rule.

    Args:
        smooth: per parameter, the map of its direction; collective where the table is sharded.
    """

    def __init__(
        self,
        parameters: Sequence[torch.Tensor],
        smooth: Sequence[Callable[[torch.Tensor], torch.Tensor]],
        config: OptimizerSection,
    ):
        super().__init__(parameters, {"lr": config.lr})
        self._config, self._smooth = config, dict(zip(parameters, smooth, strict=True))
        for parameter in parameters if config.name != "sgd" else ():
            _zero_moments(self, parameter)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                direction = self._direction(parameter, group["lr"])
                parameter.sub_(self._smooth[parameter](direction).mul_(group["lr"]))

    def _direction(self, parameter: torch.Tensor, lr: float) -> torch.Tensor:
        config = self._config
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        if config.name == "adamw":
            parameter.mul_(1 - lr * config.weight_decay)
        elif config.weight_decay:
            grad = grad + config.weight_decay * parameter
        if config.name == "sgd":
            return grad
        state, (first, second) = self.state[parameter], config.betas
        state["step"] += 1
        state["exp_avg"].lerp_(grad, 1 - first)
        state["exp_avg_sq"].mul_(second).addcmul_(grad, grad, value=1 - second)
        steps = float(state["step"])
        root = state["exp_avg_sq"].sqrt().div_((1 - second**steps) ** 0.5).add_(config.eps)
        return state["exp_avg"].div(root).div_(1 - first**steps)


def _zero_moments(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> None:
    optimizer.state[parameter] = {
        "step": torch.tensor(0.0),
        "exp_avg": torch.zeros_like(parameter),
        "exp_avg_sq": torch.zeros_like(parameter),
    }


def moments(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors that `optimizer` keeps for `parameter`, element for element; empty for SGD."""
    return {name: value for name, value in optimizer.state[parameter].items() if name != "step"}
