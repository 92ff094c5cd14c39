"""What transcriptions of methods consist of: one process, dense matrices, float64, and no code of the methods.

`tests/methods/plain_<name>.py` has the transcription of a method: a class `Plain`, with which `test_every_method.py`
compares the method. Section numbers in brackets refer to docs/methods/alignrec.md.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from torch.nn import functional

from distrec.data.dataset import Dataset
from distrec.data.sampling import Triples
from distrec.methods.base import Method
from distrec.methods.batch import Step

Weights = dict[str, torch.Tensor]
Terms = dict[str, torch.Tensor]


class Plain:
    """The interface of a transcription. There is no need to inherit from this class.

    Args:
        method: read only its `config` and `data`, and draws that cannot be repeated here.
    """

    cases: ClassVar[dict[str, dict[str, Any]]] = {}
    """Optional: more settings to compare, by name, besides the variants of the small settings."""

    def __init__(self, method: Method):
        raise NotImplementedError

    def terms(self, w: Weights, samples: Any, at: Step) -> Terms:
        """The terms of the loss by name, each with its weight, for a whole batch.

        Args:
            w: whole tables and the dense module's parameters by name, float64; the test takes gradients of them.
            samples: what the method's sampler gives, such as `Triples`.
            at: which step this is; `at.size` rows, `at.full_size` in other batches; `at.seed` and `at.epoch` are keys
                of draws.
        """
        raise NotImplementedError

    def scores(self, w: Weights) -> torch.Tensor:
        """Optional: the scores that rank the validation split, `[users, items]`."""
        raise NotImplementedError


def ids(samples: Triples) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The users, positives and negatives of a batch, `[rows]` each."""
    return torch.from_numpy(samples.users), torch.from_numpy(samples.positives), torch.from_numpy(samples.negatives)


def features(data: Dataset, names: list[str], fill: str) -> torch.Tensor:
    """The named feature sets side by side, float64, each with missing rows filled and rows of unit length."""
    sets = []
    for name in names:
        values, missing = data.feature_rows(name, 0, data.items)
        rows = values.astype(np.float64)
        if fill == "mean":
            rows[missing] = rows[~missing].mean(0)
        norms = np.linalg.norm(rows, axis=1, keepdims=True)
        sets.append(np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0))
    return torch.from_numpy(np.concatenate(sets, 1))


def info_nce(anchors: torch.Tensor, candidates: torch.Tensor, temperature: float) -> torch.Tensor:
    """NCE (4.4): the mean over k of `-a_k b_k / t + log sum_j exp(a_k b_j / t)`, with all rows normalised."""
    a, b = functional.normalize(anchors, dim=1), functional.normalize(candidates, dim=1)
    similarity = a @ b.t() / temperature
    return (similarity.logsumexp(1) - similarity.diagonal()).mean()


def bpr(users: torch.Tensor, positives: torch.Tensor, negatives: torch.Tensor) -> torch.Tensor:
    difference = (users * positives).sum(1) - (users * negatives).sum(1)
    return -torch.log(torch.sigmoid(difference)).mean()


def item_graph(content: torch.Tensor, k: int) -> torch.Tensor:
    """S (3.2) `[items, items]`: the `k` largest cosines per row, itself included, scaled by row sums on both sides."""
    unit = functional.normalize(content, dim=1)  # zeros, where an item has no feature
    cosines = unit @ unit.t()
    kept = torch.zeros_like(cosines)
    for row, values in enumerate(cosines):
        # Rounded, because the cosines of equal vectors may differ in the last bit.
        best = sorted(range(len(values)), key=lambda column, values=values: (-round(float(values[column]), 9), column))[
            :k
        ]
        kept[row, best] = values[best]
    sums = kept.sum(1)
    scale = torch.where(sums > 0, sums.clamp(min=1e-9).rsqrt(), 0.0)  # 0 where the formula is undefined is our choice
    return scale[:, None] * kept * scale[None, :]
