"""Activation checkpointing saves memory and changes no result, under every ZeRO stage and with dropout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from distrec.runtime import quiet
from tests.distributed import run_workers
from tests.training.towered import DIM, Block, build, place, weights, write_data

CASES = ((0, 0.4, 3), (1, 0.0, 1), (2, 0.4, 1), (3, 0.0, 1), (3, 0.4, 3))  # ZeRO stage, dropout, micro-batches


def trained(folder: str, stage: int, again: bool, dropout: float, accumulate: int = 1) -> tuple[Any, ...]:
    """Train three steps: the gradients of the first, the weights after the last, and how often each block ran."""
    method = {"name": "towered", "dim": DIM, "dropout": dropout}
    dense = {"zero_stage": stage, "activation_checkpointing": again}
    engine = build(folder, method=method, dense=dense, optimizer={"name": "sgd"}, train={"accumulate": accumulate})
    engine.forward_backward(0, 0, engine.samples(0, 0))
    gradients = engine.dense.gradients()
    engine.update()
    for number in (1, 2):
        epoch, step = place(engine, number)
        engine.train_step(epoch, step, engine.samples(epoch, step))
    blocks = [module for module in engine.dense._engine.module.modules() if isinstance(module, Block)]
    assert len(blocks) == 2
    return gradients, weights(engine), [block.runs for block in blocks]


def everything(folder: str) -> None:
    quiet()
    scales = {}
    for stage, dropout, accumulate in CASES:
        grads, values, runs = trained(folder, stage, False, dropout, accumulate)
        grads_again, values_again, runs_again = trained(folder, stage, True, dropout, accumulate)
        where = f"ZeRO {stage}, dropout {dropout}"
        assert runs_again == [2 * count for count in runs], where
        assert len(grads) == len(grads_again) == 9
        for found, wanted in ((grads_again, grads), (values_again, values)):
            assert all(torch.equal(found[name], wanted[name]) for name in wanted), where
        scales[dropout] = float(values["scale"])
    assert abs(scales[0.0] - scales[0.4]) > 1e-6, "dropout has no effect"


@pytest.mark.multiprocess
@pytest.mark.parametrize("size", [1, 2, 3])
def test_recomputed_blocks_give_the_same_gradients_and_draw_the_same_masks(size: int, tmp_path: Path):
    run_workers(everything, size, write_data(tmp_path / "data"), timeout=300)
