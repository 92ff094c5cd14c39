"""SASRec (Kang & McAuley 2018): next-item prediction by causal self-attention over ID vectors.

The loss is the cross-entropy over the whole catalogue at every position, which later studies found far better than the
paper's one sampled negative. The transformer block is that of ODMT's user encoders (post-norm).

See docs/methods/sasrec.md.
"""

from __future__ import annotations

import numpy as np
import torch
from pydantic import Field

from distrec.config.bounds import MOST_HEADS, MOST_LAYERS, MOST_LENGTH, MOST_WIDTH
from distrec.data.dataset import Dataset, Interactions
from distrec.data.histories import Histories
from distrec.data.sampling import Sampler, UserWindows
from distrec.errors import InputError
from distrec.methods.base import Method, MethodConfig, Representations
from distrec.methods.batch import WindowBatch
from distrec.methods.sequential import user_vectors
from distrec.methods.transformer import SequenceEncoder
from distrec.tables.spec import Table, normal


class SASRec(Method):
    """Scores are inner products of the newest position's output and the items' vectors."""

    class Config(MethodConfig):
        dim: int = Field(
            64,
            ge=1,
            le=MOST_WIDTH,
            description="d, width of item vectors and transformer blocks; a multiple of 'heads'",
        )
        length: int = Field(50, ge=1, le=MOST_LENGTH, description="n, number of items read from the end of a history")
        layers: int = Field(2, ge=0, le=MOST_LAYERS, description="b, number of transformer blocks")
        heads: int = Field(2, ge=1, le=MOST_HEADS, description="number of attention heads per block")
        dropout: float = Field(
            0.2, ge=0, lt=1, description="dropout rate of inputs, attention weights and block outputs"
        )

    config: SASRec.Config
    reads_histories = True
    changeable = ("dropout",)

    def __init__(self, config: SASRec.Config, data: Dataset):
        super().__init__(config, data)
        if config.dim % config.heads:
            raise InputError(
                f"key 'method.dim' is {config.dim}, which {config.heads} heads do not divide; change one of the two."
            )

    def sampler(self, train: Interactions, seed: int) -> Sampler:
        return UserWindows(Histories([train], self.data.users), self.config.length + 1, seed)

    def tables(self) -> list[Table]:
        # As large as the position vectors. Xavier's rule would make a table of many rows so small that their normalised
        # sum depends almost only on the positions, and training would need many epochs to overcome that.
        return [Table("item", "item", self.config.dim, normal(self.config.dim**-0.5))]

    def dense(self) -> torch.nn.Module:
        config = self.config
        return SequenceEncoder(config.dim, config.length, config.layers, config.heads, config.dropout)

    def representations(self, histories: Histories) -> Representations:
        items = self.block("item").detach()

        def newest(rows: torch.Tensor, real: torch.Tensor, users: np.ndarray) -> torch.Tensor:
            vectors: torch.Tensor = self.dense_module(rows, real)[:, -1]
            return vectors * real[:, -1:]  # without a history, all items get the same score

        return Representations(user_vectors(self.space, histories, self.config.length, items, newest), items)

    def loss(self, batch: WindowBatch) -> dict[str, torch.Tensor]:
        known, targets = batch.next_items()
        (inputs,) = self.rows("item", batch.lookup(slice(-1)))
        vectors = self.dense_module(inputs * known.unsqueeze(-1), known)[known]
        total = self.space.cross_entropy(vectors, self.block("item"), targets)
        return {"ce": total / len(targets)}
