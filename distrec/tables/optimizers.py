"""The optimizer rules, the same for exact tables and dense weights: PyTorch's own, fused."""

from __future__ import annotations

from collections.abc import Iterable

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
        optimizer.state[parameter] = {
            "step": torch.tensor(0.0),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def moments(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors that `optimizer` keeps for `parameter`, element for element; empty for SGD."""
    return {name: value for name, value in optimizer.state[parameter].items() if name != "step"}
