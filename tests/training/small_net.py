"""A small dense module for tests."""

from __future__ import annotations

import torch


class Net(torch.nn.Module):
    """A module whose sizes no number of workers divides, with a parameter of one element."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = torch.nn.Linear(5, 7), torch.nn.Linear(7, 3, bias=False)
        self.scale = torch.nn.Parameter(torch.tensor([1.5]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.first(x))) * self.scale


def net() -> Net:
    torch.manual_seed(0)
    return Net()
