"""Tables on the workers: TorchRec shards them row-wise, this class starts, reads, steps and saves them.

Two kinds (docs/design.md section 4):

* exact: TorchRec's DENSE kernel. My block is a view of the kernel's flat parameter and an ordinary leaf of autograd, so
  whole-table work costs no look-up and the paper's own optimizer steps over every row.
* sparse: TorchRec's FUSED kernel. Look-ups go through TorchRec's exchange; row-wise Adagrad runs inside backward and
  moves looked-up rows only.
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
        partitions: the user and item partitions; a table's rows lie like its side.
        seed: names the random streams of the initial values.

    Raises:
        InputError: a sparse table has too few rows to give each worker one (fbgemm's fused kernel refuses an empty
            shard).
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
                    f"table '{name}' has {partition.rows} rows, too few for 'optimizer.tables: sparse' on {world.size} "
                    "workers; use fewer workers or 'optimizer.tables: exact'."
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
        """How the rows of table `name` lie on the workers."""
        return self._partitions[name]

    def block(self, name: str) -> torch.Tensor:
        """My rows of a table, `[my rows, dim]`; with gradient where tables are exact."""
        return self._blocks[name]

    def lookup(self, name: str, ids: torch.Tensor) -> torch.Tensor:
        """Rows `ids` of a sparse table, `[len(ids), dim]`, through TorchRec's exchange. Collective.

        At most once per table and step: a second look-up would run the fused update twice on rows they share.
        """
        if name in self._looked_up:
            raise RuntimeError(f"table '{name}' is looked up twice in one step; join the ids in one call")
        self._looked_up.add(name)
        # One sequence of all ids, not one of each: TorchRec refuses a rank that brings no sequence.
        features = KeyedJaggedTensor(keys=[name], values=ids, lengths=torch.tensor([len(ids)]))
        vectors: torch.Tensor = self._collections[name](features)[name].values()
        return vectors

    def average_gradients(self) -> None:
        """Divide the gradients by the world size, once, after the last backward pass of a step.

        They are those of `world.size` times my share of the loss, a factor that DeepSpeed's averaging takes back on the
        dense side.
        Sparse tables have already stepped inside backward, where TorchRec divides by the world size itself.
        """
        if self.world.size > 1:
            for grad in self.gradients():
                grad.div_(self.world.size)

    def gradients(self) -> list[torch.Tensor]:
        """The gradients `[my rows, dim]` of those exact tables that have one, over live storage."""
        return [block.grad for block in self._blocks.values() if block.grad is not None]

    def step(self, lr: float) -> None:
        """Update exact tables from their gradients, and clear them."""
        self._looked_up.clear()
        if not self.exact:
            return
        for optimizer in dict.fromkeys(self._optimizers.values()):
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def set_sparse_lr(self, lr: float) -> None:
        """The learning rate of the fused update of the coming backward pass."""
        if not self.exact:
            for collection in self._collections.values():
                set_fused_lr(collection, lr)

    def state(self) -> dict[str, torch.Tensor]:
        """Weights and moments as sharded tensors over the live storage: saving reads it, loading writes it.

        Rows are addressed by their global number, so a checkpoint loads at any number of workers.
        """
        out: dict[str, torch.Tensor] = {}
        for name, block in self._blocks.items():
            for kind, local in {"weight": block.detach(), **self._moments(name)}.items():
                out[f"{name}.{kind}"] = by_global_row(self.world, local, self._partitions[name])
        return out

    @property
    def steps(self) -> int:
        """Optimizer steps so far (Adam's bias correction depends on it)."""
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
            for start in range(first, stop, _INIT_ROWS):
                end = min(start + _INIT_ROWS, stop)
                rows = spec.init(("table", name, seed), partition.rows, spec.dim, start, end)
                self._blocks[name][start - first : end - first] = torch.from_numpy(rows)


def by_global_row(world: World, block: torch.Tensor, partition: Partition) -> DTensor:
    """My rows of an array `[rows]` or `[rows, width]` as a sharded tensor over the same storage."""
    shape = torch.Size([partition.rows, *block.shape[1:]])
    stride = (block.shape[1], 1) if block.dim() == 2 else (1,)
    mesh = DeviceMesh("cpu", list(range(world.size)))
    return DTensor.from_local(block, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)


def _optimizers(
    blocks: Mapping[str, torch.Tensor], specs: Mapping[str, Table], config: OptimizerSection
) -> dict[str, torch.optim.Optimizer]:
    """Each exact table's optimizer; tables whose update is smoothed share one, the others another."""
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
            num_embeddings=partitions[table.name].rows,
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
