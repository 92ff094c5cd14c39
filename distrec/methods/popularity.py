"""Popularity: every user gets the items with the most training interactions, a baseline that a recommender must beat.

See docs/methods/popularity.md.
"""

from __future__ import annotations

import numpy as np
import torch

from distrec.data.histories import Histories
from distrec.methods.base import Method, MethodConfig, Representations, Space


class Popularity(Method):
    """An item's score is its number of training interactions."""

    class Config(MethodConfig):
        pass

    trainable = False

    def build(self, space: Space) -> None:
        super().build(space)
        counts = np.bincount(space.train.item, minlength=space.items.rows).astype(np.float32)
        self._counts = torch.from_numpy(counts[space.mine("item").start : space.mine("item").stop]).unsqueeze(1)

    def representations(self, histories: Histories) -> Representations:
        users = torch.ones(len(self.space.mine("user")), 1)
        return Representations(users, self._counts)
