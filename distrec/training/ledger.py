"""The ledger of an epoch: a count of how often each sample was trained on."""

from __future__ import annotations

import numpy as np
import torch

from distrec.parallel.partition import share
from distrec.parallel.world import World


class Ledger:
    """Counts how often each sample was trained on in the current epoch; each rank counts its share of every batch.

    Args:
        rows: number of samples in an epoch.
    """

    def __init__(self, rows: int):
        self.counts = torch.zeros(rows, dtype=torch.uint8)

    def mark(self, world: World, rows: np.ndarray) -> None:
        """Count my share of a global batch's samples `rows` `[B]`, which must be distinct."""
        low, high = share(len(rows), world.rank, world.size)
        self.counts[torch.from_numpy(rows[low:high])] += 1

    def merge(self, world: World) -> torch.Tensor:
        """Move the sums of all ranks' counts to rank 0. Collective.

        Returns:
            The sums, `[samples]` uint8, on every rank.
        """
        whole = world.sum_(self.counts).clone()
        if world.rank != 0:
            self.counts.zero_()
        return whole

    def close(self) -> dict[str, int]:
        """Return the totals of the epoch, and set the counts to zero for the next one. Call `merge` first."""
        counts = self.counts.to(torch.int64)
        account = {
            "expected": len(counts),
            "trained": int(counts.sum()),
            "duplicated": int((counts - 1).clamp(min=0).sum()),
            "lost": int((counts == 0).sum()),
        }
        self.counts.zero_()
        return account
