"""In-batch cross-entropy of several predictors with popularity correction, and their online distillation.

The formulas are those of docs/methods/odmt.md section 4.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils.checkpoint import checkpoint

from distrec.methods.imt import SOURCES

_BLOCK_ELEMENTS = 1 << 20  # of one array of scores; about ten such arrays exist at the same time


@dataclass(frozen=True)
class Candidates:
    """The items among which each row predicts.

    The candidates are the items' places in the batch's windows, or in my share of them. One column may represent all
    places of an item.

    Attributes:
        log_popularity: logarithm of the popularity of each column's item `[columns]`.
        log_count: logarithm of the number of candidates per column, minus infinity for none `[columns]`.
        own: whether a column's item is in a user's own window, bool `[users, columns]`.
    """

    log_popularity: torch.Tensor
    log_count: torch.Tensor
    own: torch.Tensor

    def log_weights(self, user: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """Logarithm of the weight of each column in the softmax of each row `[rows, columns]`.

        The weight is the number of candidates that the column represents. Items in the user's own window have weight 0,
        except for the label, which has weight 1.

        Args:
            user: the user of each row, as a row of `own` `[rows]`.
            label: the column that each row predicts `[rows]`.
        """
        weights = self.log_count.where(~self.own[user], -torch.inf)
        return weights.scatter(1, label.unsqueeze(1), 0.0)


def corrected_scores(users: torch.Tensor, columns: torch.Tensor, candidates: Candidates) -> list[torch.Tensor]:
    """Inner product of user and column minus the column's log-popularity, for each source `[rows, columns]`."""
    pairs = zip(users.chunk(len(SOURCES), 1), columns.chunk(len(SOURCES), 1), strict=True)
    return [torch.addmm(-candidates.log_popularity, user, column.t()) for user, column in pairs]


def distilled_softmax(
    users: torch.Tensor,
    columns: torch.Tensor,
    candidates: Candidates,
    user: torch.Tensor,
    label: torch.Tensor,
    temperature: float | None,
) -> torch.Tensor:
    """Six sums over my rows `[6]`: the cross-entropy of each source, then K(text, id), K(image, id) and K(id, mean):

        K(a, c) = t^2 sum_rows [ -sum_k softmax(c / t)_k log softmax(a / t)_k ].

    Nothing is detached, so teachers learn from their students too. The backward pass recomputes the scores, some rows
    at a time, so that memory does not grow with rows times columns.

    Args:
        users: user vector of each row `[rows, 3 dim]`.
        columns: item vector of each column `[columns, 3 dim]`.
        candidates: what the columns represent.
        user: row of `candidates.own` that each row belongs to, int64 `[rows]`.
        label: column that each row predicts, int64 `[rows]`.
        temperature: t; None: no distillation, so that the last three sums are zero.
    """
    total = users.new_zeros(2 * len(SOURCES))
    at_once = max(1, _BLOCK_ELEMENTS // max(1, len(columns)))
    for rows, whose, wanted in zip(users.split(at_once), user.split(at_once), label.split(at_once), strict=True):
        total = total + checkpoint(
            _sums, rows, columns, candidates, whose, wanted, temperature, use_reentrant=False, preserve_rng_state=False
        )
    return total


def _sums(
    users: torch.Tensor,
    columns: torch.Tensor,
    candidates: Candidates,
    user: torch.Tensor,
    label: torch.Tensor,
    temperature: float | None,
) -> torch.Tensor:
    """`distilled_softmax` of some rows."""
    scores = corrected_scores(users, columns, candidates)
    weights, wanted = candidates.log_weights(user, label), label.unsqueeze(1)
    sums = [((score + weights).logsumexp(1) - score.gather(1, wanted).squeeze(1)).sum() for score in scores]
    if temperature is None:
        return torch.stack(sums + [score.new_zeros(()) for score in scores])
    own, text, image = (score / temperature for score in scores)
    # A column of weight w represents w equal candidates: it has the probability of all of them, but the log-probability
    # of one.
    by_id, by_mean = ((teacher + weights).softmax(1) for teacher in (own, (own + text + image) / 3))
    for student, teacher in ((text, by_id), (image, by_id), (own, by_mean)):
        distance = (student + weights).logsumexp(1) - (teacher * student).sum(1)
        sums.append(temperature**2 * distance.sum())
    return torch.stack(sums)
