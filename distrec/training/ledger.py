"""The ledger of an epoch: how often each training row was trained, counted, not assumed."""

from __future__ import annotations

import numpy as np
import torch

from distrec.parallel.partition import share
from distrec.parallel.world import World


class Ledger:
    """Counts of trained rows in the running epoch; each rank counts its own share of every batch."""

    def __init__(self, rows: int):
        self.counts = torch.zeros(rows, dtype=torch.uint8)

    def mark(self, world: World, rows: np.ndarray) -> None:
        """Count my share of a global batch's training rows (no row occurs twice in one batch)."""
        low, high = share(len(rows), world.rank, world.size)
        self.counts[torch.from_numpy(rows[low:high])] += 1

    def merge(self, world: World) -> torch.Tensor:
        """Bring every rank's counts together on rank 0, where they stay, and return them on every rank. Collective."""
        whole = world.sum_(self.counts).clone()
        if world.rank != 0:
            self.counts.zero_()
        return whole

    def close(self) -> dict[str, int]:
        """The epoch's account (of merged counts), and zero for the next one."""
        counts = self.counts.to(torch.int64)
        account = {
            "expected": len(counts),
            "trained": int(counts.sum()),
            "duplicated": int((counts - 1).clamp(min=0).sum()),
            "lost": int((counts == 0).sum()),
        }
        self.counts.zero_()
        return account
