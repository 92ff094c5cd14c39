"""Mean and variance over all entries of partitioned tables, with gradient: exact at any number of workers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from distrec.parallel.world import World

Moments = tuple[float, float, float]  # count, mean, sum of squared deviations


class _PopulationMoments(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, world: World, sizes: Sequence[int], copies: Sequence[int], *blocks: torch.Tensor) -> Any:
        tables, start = [], 0
        for size in sizes:
            tables.append(merged([moments_of(block) for block in blocks[start : start + size]]))
            start += size
        everyone = torch.zeros(world.size, len(sizes), 3, dtype=torch.float64)
        everyone[world.rank] = torch.tensor(tables, dtype=torch.float64)
        world.sum_(everyone)
        whole = [merged([tuple(rank[table]) for rank in everyone.tolist()]) for table in range(len(sizes))]
        ctx.world, ctx.sizes, ctx.copies, ctx.whole = world, sizes, copies, whole
        ctx.save_for_backward(*blocks)
        rows = [(m2 * c / (count * c - 1), mean) for (count, mean, m2), c in zip(whole, copies, strict=True)]
        return torch.tensor(rows, dtype=torch.float64)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        of_var, of_mean = ctx.world.sum_(grad.clone()).t().tolist()
        blocks, out, start = ctx.saved_tensors, [], 0
        for table, size in enumerate(ctx.sizes):
            count, mean, _ = ctx.whole[table]
            slope = 2 * ctx.copies[table] * of_var[table] / (count * ctx.copies[table] - 1)
            shift = of_mean[table] / count
            # Subtract the mean first: `slope * x - slope * mean` would lose digits where the mean is far from zero.
            out += [(block - mean).mul_(slope).add_(shift) for block in blocks[start : start + size]]
            start += size
        return (None, None, None, *out)


def moments_of(block: torch.Tensor) -> Moments:
    """Count, mean and sum of squared deviations of all entries of `block`, of any shape."""
    if not block.numel():
        return 0.0, 0.0, 0.0
    # Sum in float64: means that are far from zero differ by little, and `merged` squares that difference.
    count = block.numel()
    mean = float(block.sum(dtype=torch.float64)) / count
    centre = float(np.float32(mean))  # the mean in float32, which can be subtracted from float32 entries
    m2 = float((block - centre).square_().sum(dtype=torch.float64)) - count * (mean - centre) ** 2
    return float(count), mean, max(m2, 0.0)


def merged(parts: Sequence[Moments]) -> Moments:
    """The moments of the union of several populations (Chan et al. 1979)."""
    count, mean, m2 = 0.0, 0.0, 0.0
    for part_count, part_mean, part_m2 in parts:
        if not part_count:
            continue
        total, difference = count + part_count, part_mean - mean
        mean += difference * part_count / total
        m2 += part_m2 + difference**2 * count * part_count / total
        count = total
    return count, mean, m2


def population_moments(world: World, tables: Sequence[Sequence[torch.Tensor]], copies: Sequence[int]) -> torch.Tensor:
    """Unbiased variance and mean over all entries of each table, `[tables, 2]` float64, the same on every rank.

    Args:
        tables: for each table, my rows of the blocks it consists of, `[my rows, width]`; no two blocks share entries.
        copies: how often each table repeats its blocks; this matters only for the factor n / (n - 1) of its variance.
    """
    blocks = [block for table in tables for block in table]
    result: torch.Tensor = _PopulationMoments.apply(world, [len(table) for table in tables], copies, *blocks)
    return result
