"""Tables on the workers: TorchRec shards them row-wise; this class initialises, reads, updates and saves them.

There are two kinds (docs/design.md section 4):

* exact: TorchRec's DENSE kernel. My block is a view of the kernel's flat parameter and an ordinary autograd leaf.
  Whole-table work needs no look-up, and the paper's own optimizer updates every row.
* sparse: TorchRec's FUSED kernel. Look-ups go through TorchRec's exchange. Row-wise Adagrad runs in the backward pass
  and updates only the rows that were looked up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torchrec import EmbeddingCollection, EmbeddingConfig, KeyedJaggedTensor
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embedding import EmbeddingCollectionSharder, ShardedEmbeddingCollection
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise
from torchrec.distributed.types import ShardingPlan
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from distrec.config.run import OptimizerSection
from distrec.errors import InputError
from distrec.parallel.partition import Partition
from distrec.parallel.world import World
from distrec.tables.optimizers import SmoothedOptimizer, build_optimizer, moments
from distrec.tables.spec import Side, Table
from distrec.tables.torchrec_internals import local_sums_of_squares, local_weights, set_fused_lr

_INIT_ROWS = 65_536


class ShardedTables:
    """All tables of a method.

    Args:
        partitions: the user and item partitions; a table is partitioned like its side.
        seed: part of the keys of the random initial values.

    Raises:
        InputError: a sparse table has too few rows to give each worker one (fbgemm's fused kernel does not accept an
            empty shard).
    """

    def __init__(
        self,
        world: World,
        tables: Sequence[Table],
        partitions: Mapping[Side, Partition],
        optimizer: OptimizerSection,
        seed: int,
    ):
        self.world, self.exact = world, optimizer.tables == "exact"
        self.specs = {table.name: table for table in tables}
        self._partitions = {table.name: partitions[table.side] for table in tables}
        for name, partition in self._partitions.items():
            if not self.exact and not partition.count(world.size - 1):
                raise InputError(
                    f"table '{name}' has {partition.total} rows, too few for 'optimizer.tables: sparse' on "
                    f"{world.size} workers; use fewer workers or 'optimizer.tables: exact'."
                )
        self._collections = _shard(world, tables, self._partitions, optimizer)
        self._blocks = {
            name: local_weights(collection, name).requires_grad_(self.exact)
            for name, collection in self._collections.items()
        }
        for name in self.specs:
            self._initialise(name, seed)
        self._optimizers = _optimizers(self._blocks, self.specs, optimizer) if self.exact else {}
        self._looked_up: set[str] = set()

    def partition(self, name: str) -> Partition:
        """The partition of the rows of table `name` over the workers."""
        return self._partitions[name]

    def block(self, name: str) -> torch.Tensor:
        """My rows of a table, `[my rows, dim]`; they have gradients only if tables are exact."""
        return self._blocks[name]

    def lookup(self, name: str, ids: torch.Tensor) -> torch.Tensor:
        """Rows `ids` of a sparse table, `[len(ids), dim]`, through TorchRec's exchange. Collective.

        Raises:
            RuntimeError: the table was looked up before in this step. The fused update would then run twice on rows
                that both look-ups contain.
        """
        if name in self._looked_up:
            raise RuntimeError(f"table '{name}' is looked up twice in one step; join the ids in one call")
        self._looked_up.add(name)
        # All ids form one sequence, instead of one sequence each: TorchRec does not accept a rank without sequences.
        features = KeyedJaggedTensor(keys=[name], values=ids, lengths=torch.tensor([len(ids)]))
        vectors: torch.Tensor = self._collections[name](features)[name].values()
        return vectors

    def average_gradients(self) -> None:
        """Divide the gradients of exact tables by the world size, once, after the last backward pass of a step.

        `DenseEngine.backward` multiplies my share of the loss by the world size. DeepSpeed's averaging removes this
        factor from dense gradients, and TorchRec removes it from the update that sparse tables make in the backward
        pass.
        """
        if self.world.size > 1:
            for grad in self.gradients():
                grad.div_(self.world.size)

    def gradients(self) -> list[torch.Tensor]:
        """The gradients `[my rows, dim]` of those exact tables that have one: the tensors themselves, not copies."""
        return [block.grad for block in self._blocks.values() if block.grad is not None]

    def step(self, lr: float) -> None:
        """Update exact tables, then clear their gradients."""
        self._looked_up.clear()
        if not self.exact:
            return
        for optimizer in dict.fromkeys(self._optimizers.values()):
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def set_sparse_lr(self, lr: float) -> None:
        """Set the learning rate for the fused updates of sparse tables, from the next look-up on."""
        if not self.exact:
            for collection in self._collections.values():
                set_fused_lr(collection, lr)

    def state(self) -> dict[str, torch.Tensor]:
        """Weights and moments by name, as sharded tensors that share storage with those in use.

        Rows have global numbers, so a checkpoint can be loaded at any number of workers.
        """
        out: dict[str, torch.Tensor] = {}
        for name, block in self._blocks.items():
            for kind, local in {"weight": block.detach(), **self._moments(name)}.items():
                out[f"{name}.{kind}"] = by_global_row(self.world, local, self._partitions[name])
        return out

    @property
    def steps(self) -> int:
        """Number of optimizer steps so far (Adam's bias correction depends on it)."""
        return next((int(state["step"]) for state in self._states() if "step" in state), 0)

    @steps.setter
    def steps(self, count: int) -> None:
        for state in self._states():
            if "step" in state:
                state["step"].fill_(count)

    def _states(self) -> Iterator[dict[str, torch.Tensor]]:
        return (optimizer.state[self._blocks[name]] for name, optimizer in self._optimizers.items())

    def _moments(self, name: str) -> dict[str, torch.Tensor]:
        if self.exact:
            return moments(self._optimizers[name], self._blocks[name])
        return {"sum_of_squares": local_sums_of_squares(self._collections[name], name)}

    def _initialise(self, name: str, seed: int) -> None:
        spec, partition = self.specs[name], self._partitions[name]
        first, stop = partition.start(self.world.rank), partition.stop(self.world.rank)
        assert len(self._blocks[name]) == stop - first
        with torch.no_grad():
            if spec.start is not None:
                self._blocks[name].copy_(spec.start())
                return
            for start in range(first, stop, _INIT_ROWS):
                end = min(start + _INIT_ROWS, stop)
                rows = spec.init(("table", name, seed), partition.total, spec.dim, start, end)
                self._blocks[name][start - first : end - first] = torch.from_numpy(rows)


def by_global_row(world: World, block: torch.Tensor, partition: Partition) -> DTensor:
    """My rows of an array `[rows]` or `[rows, width]`, as a sharded tensor that shares their storage."""
    shape = torch.Size([partition.total, *block.shape[1:]])
    stride = (block.shape[1], 1) if block.dim() == 2 else (1,)
    mesh = DeviceMesh("cpu", list(range(world.size)))
    return DTensor.from_local(block, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)


def _optimizers(
    blocks: Mapping[str, torch.Tensor], specs: Mapping[str, Table], config: OptimizerSection
) -> dict[str, torch.optim.Optimizer]:
    """Each exact table's optimizer: tables with a smoothed update share one, and the other tables share another."""
    plain = [name for name in blocks if specs[name].smooth is None]
    out = dict.fromkeys(plain, build_optimizer([blocks[name] for name in plain], config)) if plain else {}
    maps = {name: spec.smooth for name, spec in specs.items() if spec.smooth is not None}
    if maps:
        smoothed = SmoothedOptimizer([blocks[name] for name in maps], list(maps.values()), config)
        out |= dict.fromkeys(maps, smoothed)
    return out


def _shard(
    world: World, tables: Sequence[Table], partitions: Mapping[str, Partition], optimizer: OptimizerSection
) -> dict[str, ShardedEmbeddingCollection]:
    """One TorchRec embedding collection per table (a collection must have a single width), sharded row-wise."""
    if not tables:
        return {}
    exact, sharder = optimizer.tables == "exact", EmbeddingCollectionSharder()
    modules = torch.nn.ModuleDict()
    for table in tables:
        config = EmbeddingConfig(
            name=table.name,
            num_embeddings=partitions[table.name].total,
            embedding_dim=table.dim,
            feature_names=[table.name],
        )
        modules[table.name] = EmbeddingCollection(tables=[config], device=torch.device("meta"))
    if not exact:
        apply_optimizer_in_backward(RowWiseAdagrad, modules.parameters(), {"lr": optimizer.lr, "eps": optimizer.eps})
    plan = {
        name: construct_module_sharding_plan(
            module,
            {name: row_wise(compute_kernel="dense" if exact else "fused")},
            sharder=sharder,
            local_size=world.size,
            world_size=world.size,
            device_type="cpu",
        )
        for name, module in modules.items()
    }
    model = DistributedModelParallel(
        modules,
        device=torch.device("cpu"),
        plan=ShardingPlan(plan=plan),
        sharders=[sharder],
        init_data_parallel=False,
    )
    return {name: model.module[name] for name in modules}
