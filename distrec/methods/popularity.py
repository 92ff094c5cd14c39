"""Popularity: every user gets the items with the most training interactions, a baseline that a recommender must beat.

See docs/methods/popularity.md.
"""

from __future__ import annotations

import numpy as np
import torch

from distrec.data.histories import Histories
from distrec.methods.base import Method, MethodConfig, Representations
from distrec.methods.workspace import Workspace


class Popularity(Method):
    """An item's score is its number of training interactions."""

    class Config(MethodConfig):
        pass

    trainable = False

    def build(self, space: Workspace) -> None:
        super().build(space)
        counts = np.bincount(space.train.item, minlength=space.count("item")).astype(np.float32)
        self._counts = space.my_rows("item", torch.from_numpy(counts)).unsqueeze(1)

    def representations(self, histories: Histories) -> Representations:
        users = torch.ones(self.space.my_count("user"), 1)
        return Representations(users, self._counts)
