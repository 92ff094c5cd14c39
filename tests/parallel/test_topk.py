import math
from itertools import pairwise

import pytest
import torch

from distrec.parallel.topk import merge_top, top_columns


def sorted_plainly(scores: torch.Tensor, k: int) -> list[list[int]]:
    """For each row, the first `k` columns by descending score, then ascending column, in plain Python."""
    return [sorted(range(len(row)), key=lambda column, row=row: (-row[column], column))[:k] for row in scores.tolist()]


def scores_of(kind: str, rows: int, columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if kind == "distinct":
        return torch.randn(rows, columns, generator=generator)
    if kind == "constant":
        return torch.zeros(rows, columns)
    scores = torch.randint(0, 4, (rows, columns), generator=generator).float()  # many ties
    if kind == "masked":
        scores[torch.rand(rows, columns, generator=generator) < 0.6] = -math.inf
        scores[0] = -math.inf
        scores[-1, ::2] = math.inf
    if kind == "zeros":
        scores = torch.where(torch.rand(rows, columns, generator=generator) < 0.5, 0.0, -0.0)
    return scores


KINDS = ["distinct", "constant", "ties", "masked", "zeros"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 2), (5, 17), (20, 60), (4, 1000)])
def test_the_best_columns_are_those_of_a_plain_sort(kind: str, rows: int, columns: int):
    for seed in range(3):
        scores = scores_of(kind, rows, columns, seed)
        before = scores.clone()
        for k in sorted({1, 2, 7, columns - 1, columns, columns + 3} - {0}):
            values, found = top_columns(scores, k)
            assert found.dtype == torch.int64
            assert found.tolist() == sorted_plainly(scores, k)
            assert torch.equal(values, scores.gather(1, found))
        assert torch.equal(scores, before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 4, 11, 100])
def test_any_cut_into_chunks_merges_to_the_whole(kind: str, k: int):
    for seed in range(10):
        generator = torch.Generator().manual_seed(100 + seed)
        columns = int(torch.randint(1, 70, (), generator=generator))
        scores = scores_of(kind, 6, columns, seed)
        cuts = torch.randint(0, columns + 1, (4,), generator=generator).sort().values.unique().tolist()
        edges = sorted({0, *cuts, columns})
        values, found = torch.empty(6, 0), torch.empty(6, 0, dtype=torch.int64)
        for start, stop in pairwise(edges):
            more_values, more = top_columns(scores[:, start:stop], k)
            values, found = merge_top(values, found, more_values, more + start, k)
        assert found.tolist() == sorted_plainly(scores, k)
        assert torch.equal(values, scores.gather(1, found))


def test_no_rows_give_no_rows():
    values, found = top_columns(torch.empty(0, 5), 3)
    assert values.shape == found.shape == (0, 3)
