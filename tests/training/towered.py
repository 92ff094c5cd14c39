"""A method for training tests that need a dense module: BPR-MF whose item rows pass through a small tower.

The module also has the same training in plain PyTorch in one process.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch

from distrec.config import RunConfig, decode
from distrec.data.dataset import Dataset
from distrec.methods.batch import Batch
from distrec.methods.bprmf import BprMf
from distrec.methods.losses import bpr
from distrec.methods.registry import METHODS, resolve
from distrec.parallel.world import World
from tests.training.random_data import write_random

DIM, GLOBAL_BATCH, USERS, ITEMS = 4, 50, 31, 23
STEPS = 5  # an epoch has three, and its last batch has 2 rows: with 3 workers, one has none


def write_data(path: Path) -> str:
    return write_random(path, USERS, ITEMS, 2 * GLOBAL_BATCH + 2, 0)


class Block(torch.nn.Module):
    """A residual block whose sizes no number of workers divides."""

    recompute: ClassVar[bool] = True

    def __init__(self, dim: int, dropout: float):
        super().__init__()
        self.first, self.last = torch.nn.Linear(dim, 7), torch.nn.Linear(7, dim, bias=False)
        self.gain = torch.nn.Parameter(torch.full((dim,), 0.5))  # the block's own, since ZeRO 3 gathers by module
        self.dropout, self.runs = dropout, 0

    def forward(self, x: torch.Tensor, *, scale: torch.Tensor) -> torch.Tensor:
        self.runs += 1
        hidden = torch.nn.functional.dropout(torch.tanh(self.first(x)), self.dropout, self.training)
        return x + self.last(hidden) * self.gain * scale


class Tower(torch.nn.Module):
    """Two blocks and a parameter of one element. Inputs and outputs are mappings that include an integer tensor."""

    def __init__(self, dim: int, dropout: float = 0.0):
        super().__init__()
        self.blocks = torch.nn.ModuleList([Block(dim, dropout), Block(dim, dropout)])
        self.scale = torch.nn.Parameter(torch.tensor([1.5]))

    def forward(self, rows: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        out = dict(rows)
        for name in ("positives", "negatives"):
            for block in self.blocks:
                out[name] = block(out[name], scale=self.scale)
        return out


def terms(
    users: torch.Tensor, positives: torch.Tensor, negatives: torch.Tensor, tower: Any, size: int
) -> dict[str, torch.Tensor]:
    ids = torch.arange(len(users))
    out = tower({"positives": positives, "negatives": negatives, "ids": ids})
    assert out["ids"].dtype == torch.int64
    assert out["positives"].dtype == out["negatives"].dtype == torch.float32
    squares = sum(rows.square().sum() for rows in (users, positives, negatives))
    return {
        "bpr": bpr(users, out["positives"], out["negatives"]).sum() / size,
        "reg": 0.01 * squares / size,  # type: ignore[dict-item]
    }


class Towered(BprMf):
    class Config(BprMf.Config):
        dropout: float = 0.0

    config: Towered.Config

    def dense(self) -> torch.nn.Module:
        return Tower(self.config.dim, self.config.dropout)

    def loss(self, batch: Batch) -> dict[str, torch.Tensor]:
        (users,) = self.rows("user", batch.users)
        positives, negatives = self.rows("item", batch.positives, batch.negatives)
        return terms(users, positives, negatives, self.dense_module, batch.size)


def build(folder: str, *, method: dict[str, Any] | None = None, **sections: dict[str, Any]) -> Any:
    """An engine on this worker; `sections` are sections of the run config."""
    from distrec.training.engine import Engine

    METHODS["towered"] = Towered
    tree: dict[str, Any] = {"data": folder, "run": {"name": "r"}, **sections}
    tree["method"] = method or {"name": "towered", "dim": DIM}
    tree["train"] = {"global_batch": GLOBAL_BATCH} | sections.get("train", {})
    return Engine(World.current(), Dataset.open(folder), resolve(decode(RunConfig, tree)))


def place(engine: Any, number: int) -> tuple[int, int]:
    """The epoch and the step within it, for a step's number in the run."""
    epoch, step = divmod(number, engine.steps_per_epoch)
    return epoch, step


def weights(engine: Any) -> dict[str, torch.Tensor]:
    """Whole tables and dense weights by name. Collective."""
    tables = {
        name: engine.world.gather_blocks(engine.tables.block(name).detach(), engine.tables.partition(name)).clone()
        for name in engine.tables.specs
    }
    dense = engine.dense.state().items()
    return tables | {name.removesuffix(".weight"): value for name, value in dense if name.endswith(".weight")}


def plain(engine: Any, clip: float = 0.0) -> Iterator[tuple[float, float, dict[str, torch.Tensor]]]:
    """Train tables and tower with PyTorch's AdamW in one process.

    Yields the loss, the gradient norm before clipping and the weights of each step.
    """
    optimizer, seed = engine.config.optimizer, engine.config.train.seed
    rows = {"user": USERS, "item": ITEMS}
    tables = {
        name: torch.from_numpy(spec.init(("table", name, seed), rows[name], spec.dim, 0, rows[name])).requires_grad_()
        for name, spec in engine.tables.specs.items()
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tower = Tower(DIM)
    named = tables | dict(tower.named_parameters())
    rule = torch.optim.AdamW(
        named.values(), optimizer.lr, (optimizer.betas[0], optimizer.betas[1]), optimizer.eps, optimizer.weight_decay
    )
    for number in range(STEPS):
        triples = engine.samples(*place(engine, number))
        ids = [torch.from_numpy(getattr(triples, name)) for name in ("users", "positives", "negatives")]
        looked_up = [tables[name][index] for name, index in zip(("user", "item", "item"), ids, strict=True)]
        loss = torch.stack(list(terms(*looked_up, tower, len(ids[0])).values())).sum()
        rule.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(named.values(), clip or float("inf"))
        rule.step()
        yield float(loss.detach()), float(norm), {name: value.detach().clone() for name, value in named.items()}
