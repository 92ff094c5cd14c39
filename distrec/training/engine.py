"""One worker's whole model: a method, its tables, its dense module and its batches.

This module alone defines the order of a step: loss shares, backward pass, clipping, dense update, table update.
"""

from __future__ import annotations

from typing import Any

import torch

from distrec.config.run import RunConfig
from distrec.data import keyed
from distrec.data.dataset import Dataset
from distrec.data.histories import Histories
from distrec.data.manifest import CONTEXT, SPLITS, Split
from distrec.data.sampling import Samples, cut
from distrec.errors import NonFiniteLoss
from distrec.methods.base import Representations
from distrec.methods.batch import Batch, Lookup, OwnedRows, Step, batch_of
from distrec.methods.registry import build_method
from distrec.methods.workspace import Workspace
from distrec.parallel.world import World
from distrec.tables.sharded import ShardedTables, by_global_row
from distrec.training.clipping import clip_gradients
from distrec.training.dense import DenseEngine


class Engine:
    """Trains one method on one worker. Collective: every rank builds it with the same arguments.

    Args:
        data: the prepared dataset.
        config: a resolved run config.
    """

    def __init__(self, world: World, data: Dataset, config: RunConfig):
        self.world, self.config = world, config
        self.train_rows = data.interactions("train")
        self.space = Workspace(world, data, self.train_rows, config.run.graphs)
        self.method = build_method(config, data)
        self.method.build(self.space)
        seed = config.train.seed
        self._sampler = self.method.sampler(self.train_rows, seed) if self.method.trainable else None
        self._histories: dict[Split, Histories] = {}
        # The seed gives the same initial dense weights on every rank, at any world size. The fork keeps the random
        # numbers that the libraries draw here from changing torch's random state outside.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module = self.method.dense()
            self.tables = ShardedTables(world, self.method.tables(), self.space.partitions, config.optimizer, seed)
            self.dense = DenseEngine(world, module, config.optimizer, config.dense)
        self.method.attach(self.tables.block, self._rows, self.dense)
        self._lr, self._epoch = config.optimizer.lr, -1
        self.grad_norm: float | None = None
        """L2 norm of the whole gradient in the last step, before clipping; None without `optimizer.clip_norm`."""

    @property
    def samples_per_epoch(self) -> int:
        """Number of samples in an epoch; a sample is a training pair or a window of a history."""
        return len(self._sampler) if self._sampler else 0

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps in an epoch; the last batch may be short."""
        return -(-self.samples_per_epoch // self.config.train.global_batch)

    def samples(self, epoch: int, step: int) -> Samples:
        """The whole global batch of a step, the same on every rank.

        Raises:
            RuntimeError: the method does not train.
        """
        if self._sampler is None:
            raise RuntimeError(f"{type(self.method).__name__} has nothing to train")
        return self._sampler.batch(epoch, step, self.config.train.global_batch)

    def batches(self, epoch: int, step: int, samples: Samples) -> list[Batch]:
        """The method's view of a global batch: its micro-batches."""
        train, size = self.config.train, len(samples.users)
        return [
            batch_of(
                self.world, self.space.users, self.space.items, piece,
                Step(train.seed, epoch, step, size, train.global_batch, part),
            )
            for part, piece in enumerate(cut(samples, train.accumulate))
        ]  # fmt: skip

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the next steps.

        Do not call it during a step: fused tables read the rate at their look-up.
        """
        self._lr = lr
        self.tables.set_sparse_lr(lr)

    def train_step(self, epoch: int, step: int, samples: Samples, flag: int = 0) -> tuple[dict[str, float], int]:
        """Train a whole step on a global batch: `forward_backward`, then `update`. Collective.

        Returns:
            Every loss term over the whole batch, and the sum over ranks of `flag`.

        Raises:
            NonFiniteLoss: a term or the gradient is NaN or infinite; no weight has changed, except sparse tables, which
                the backward pass updates.
        """
        result = self.forward_backward(epoch, step, samples, flag)
        self.update()
        return result

    def forward_backward(self, epoch: int, step: int, samples: Samples, flag: int = 0) -> tuple[dict[str, float], int]:
        """Run the forward and backward pass of every micro-batch. Collective.

        Until `update`, the gradients are then those of the whole loss.

        Returns:
            Every loss term over the whole batch, and the sum over ranks of `flag`.

        Raises:
            NonFiniteLoss: a term is NaN or infinite; no weight has changed.
        """
        if epoch != self._epoch:
            self._epoch = epoch
            self.method.start_epoch(self.config.train.seed, epoch)
        whole: dict[str, float] = {}
        flags = 0
        batches = self.batches(epoch, step, samples)
        for batch in batches:
            share, terms, raised = self._forward(batch, 0 if batch.part else flag)
            flags += raised
            whole = {name: whole.get(name, 0.0) + value for name, value in terms.items()}
            self.dense.backward(share, last=batch is batches[-1])
        self.tables.average_gradients()
        return whole, flags

    def update(self) -> None:
        """Clip the gradient if the config asks for it, then make one step with every optimizer. Collective.

        Raises:
            NonFiniteLoss: clipping or DeepSpeed found a gradient that is not finite; no weight has changed, except
                sparse tables, which the backward pass has updated.
        """
        if self.config.optimizer.clip_norm:
            dense, replicated = self.dense.local_gradients(), self.dense.replicated
            self.grad_norm = clip_gradients(
                self.world,
                self.tables.gradients() + ([] if replicated else dense),
                dense if replicated else [],
                self.config.optimizer.clip_norm,
            )
        self.dense.step(self._lr)  # first, since it may raise NonFiniteLoss
        self.tables.step(self._lr)

    def _forward(self, batch: Batch, flag: int) -> tuple[torch.Tensor, dict[str, float], int]:
        """My share of the total loss, every term over the whole batch, and the sum over ranks of `flag`."""
        # Modules draw random numbers themselves (dropout). A seed that depends on the step makes a resumed run draw the
        # same ones. These are the only draws that depend on the number of workers.
        torch.manual_seed(keyed.number(("dropout", batch.seed, batch.epoch, batch.step, batch.part, self.world.rank)))
        self.dense.train(True)
        terms = self.method.loss(batch)
        shares = torch.stack(
            [*(term.detach().double() for term in terms.values()), torch.tensor(float(flag), dtype=torch.float64)]
        )
        values = self.world.sum_(shares).tolist()
        whole = dict(zip(terms, values[:-1], strict=True))
        for name, value in whole.items():
            if not abs(value) < float("inf"):
                raise NonFiniteLoss(
                    f"loss term '{name}' is {value} at epoch {batch.epoch + 1}, step {batch.step + 1}; weights were "
                    "not touched. Lower 'optimizer.lr' or check the features."
                )
        return torch.stack(list(terms.values())).sum(), whole, int(values[-1])

    @torch.no_grad()
    def representations(self, split: Split = "valid") -> Representations:
        """My rows of user and item vectors, from the current weights, for ranking `split`. Collective."""
        self.dense.train(False)
        return self.method.representations(self.histories(split))

    def histories(self, split: Split) -> Histories:
        """The users' histories before `split`: the interactions of the earlier splits and of the context."""
        if split not in self._histories:
            earlier = (CONTEXT, *SPLITS[1 : SPLITS.index(split)])
            rows = [self.train_rows, *(self.space.data.interactions(name) for name in earlier)]
            self._histories[split] = Histories(rows, self.space.users.total)
        return self._histories[split]

    def state(self) -> dict[str, Any]:
        """Tables, dense weights, all moments and the other tensors that the method keeps, by name. Collective.

        Tensors other than the dense ones share storage with those in use.
        """
        kept = self.method.kept().items()
        return {
            **{f"table.{name}": value for name, value in self.tables.state().items()},
            **{f"kept.{name}": by_global_row(self.world, x, self.space.partitions[side]) for name, (side, x) in kept},
            **{f"dense.{name}": value for name, value in self.dense.state().items()},
        }

    def load_dense(self, state: dict[str, Any], steps: int) -> None:
        """Set the dense part from a loaded `state()`, and the number of optimizer steps made so far. Collective."""
        self.dense.load(
            {name.removeprefix("dense."): value for name, value in state.items() if name.startswith("dense.")}
        )
        self.dense.steps = self.tables.steps = steps

    def _rows(self, table: str, *lookups: Lookup | OwnedRows) -> list[torch.Tensor]:
        if self.tables.exact:
            return [lookup.rows(self.tables.block(table))[0] for lookup in lookups]
        joined = self.tables.lookup(table, torch.cat([lookup.mine.flatten() for lookup in lookups]))
        parts = joined.split([lookup.mine.numel() for lookup in lookups])
        return [part.view(*lookup.mine.shape, part.shape[-1]) for lookup, part in zip(lookups, parts, strict=True)]
