"""The K best columns of each row, merged over chunks of columns, with a fixed order among equal scores.

The order is always: higher score first, then lower column number. `torch.topk` alone does not guarantee this; of
several equal scores it may keep any.
"""

from __future__ import annotations

import torch


def top_columns(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `min(k, columns)` best entries of each row of `scores` `[rows, columns]`: values and int64 column numbers."""
    k = min(k, scores.shape[1])
    values, columns = torch.topk(scores, min(k + 1, scores.shape[1]), sorted=True)
    tied = values[:, 1:] == values[:, :-1]
    if values.shape[1] > k:
        cut = tied[:, k - 1].nonzero().squeeze(1)
        values, columns = values[:, :k].contiguous(), columns[:, :k].contiguous()
        if len(cut):  # equal scores on both sides of the cut: keep those with the lowest column numbers
            columns[cut] = _lowest_columns(scores[cut], values[cut, -1:], k)
            values[cut] = scores[cut].gather(1, columns[cut])
    again = tied.any(1).nonzero().squeeze(1)
    if len(again):
        ascending = columns[again].sort(dim=1).values
        ordered, place = scores[again].gather(1, ascending).sort(dim=1, descending=True, stable=True)
        values[again], columns[again] = ordered, ascending.gather(1, place)
    return values, columns


def merge_top(
    values: torch.Tensor, columns: torch.Tensor, more_values: torch.Tensor, more_columns: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The K best of two ordered lists `[rows, …]`; all columns of the second have higher numbers than the first's."""
    both, place = torch.cat([values, more_values], 1).sort(dim=1, descending=True, stable=True)
    return both[:, :k].contiguous(), torch.cat([columns, more_columns], 1).gather(1, place[:, :k])


def _lowest_columns(scores: torch.Tensor, last: torch.Tensor, k: int) -> torch.Tensor:
    """For each row, the columns above the value `last` and the first columns equal to it: `k` in all, ascending."""
    above, equal = scores > last, scores == last
    room = k - above.sum(1, keepdim=True)
    keep = above | (equal & (equal.cumsum(1) <= room))
    return keep.nonzero()[:, 1].view(-1, k)
