"""Everything that distrec relies on in TorchRec and fbgemm beyond what they document.

All calls are public: a sharded collection's `state_dict` and its `fused_optimizer`. It is not documented that their
tensors share storage with the kernels, nor what the parts of the fused optimizer mean.
`tests/tables/test_torchrec_internals.py` fails if a new version of TorchRec changes this.
"""

from __future__ import annotations

from typing import Any

import torch
from torchrec.distributed.embedding import ShardedEmbeddingCollection


def local_weights(collection: ShardedEmbeddingCollection, table: str) -> torch.Tensor:
    """My rows `[my rows, dim]` of a table, sharing the storage that its kernel reads and writes.

    Relies on `state_dict` holding views, not copies. The kernels' own parameters cannot be used instead: a dense
    kernel's is flat, a fused kernel's is a buffer, and both are private attributes.
    """
    return _local(collection.state_dict()[f"embeddings.{table}.weight"])


def local_sums_of_squares(collection: ShardedEmbeddingCollection, table: str) -> torch.Tensor:
    """Row-wise Adagrad's sums `[my rows]` of mean squared gradients, sharing storage with those in use.

    Relies on TorchRec's name for them, `momentum1`, and on the fused optimizer's state holding views, not copies.
    fbgemm's `split_optimizer_states` returns the same tensor, but the kernel that has it is private in TorchRec.
    """
    state = collection.fused_optimizer.state_dict()["state"]
    return _local(state[f"embeddings.{table}.weight"][f"{table}.momentum1"])


def set_fused_lr(collection: ShardedEmbeddingCollection, lr: float) -> None:
    """Set the learning rate that a fused kernel reads at its next look-up and uses in that look-up's backward pass.

    Relies on the fused optimizer's `step` passing the rate to the kernel without changing a row. The kernel's own
    `set_learning_rate` is public, but the kernel is private in TorchRec.
    """
    for group in collection.fused_optimizer.param_groups:
        group["lr"] = lr
    collection.fused_optimizer.step()


def _local(sharded: Any) -> torch.Tensor:
    (shard,) = sharded.local_shards()  # there is one even on a rank that has no rows of a small table
    tensor: torch.Tensor = shard.tensor
    return tensor.detach()
