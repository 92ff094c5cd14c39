"""Losses and gradients of AlignRec, LightGCN and BPR-MF, through the engine, against dense float64 transcriptions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distrec.config import RunConfig, decode
from distrec.data.dataset import Dataset
from distrec.data.sampling import Triples
from distrec.methods.registry import resolve
from distrec.parallel.world import World
from distrec.runtime import quiet
from tests.distributed import run_workers
from tests.graph.cases import dense
from tests.methods import plain
from tests.oracle.gather import dense_gradients, table_gradients, table_weights
from tests.training.random_data import write_random

ALIGNREC: dict[str, Any] = {"name": "alignrec", "dim": 8, "knn_k": 4, "sim_weight": 0.3, "cl_loss": 0.2}
CASES: list[dict[str, Any]] = [
    ALIGNREC,
    ALIGNREC | {"item_layers": 2, "user_item_layers": 3, "side_emb_div": 2.0, "fill": "zeros", "cca_temperature": 0.5},
    ALIGNREC | {"moving_target": False, "features": ["image"], "item_layers": 0, "user_item_layers": 0},
    ALIGNREC | {"cl_loss": 0.0, "uia_weight": 0.0, "sim_weight": 0.0, "layer_norm": True, "knn_k": 1, "dim": 5},
    {"name": "lightgcn", "dim": 8, "layers": 3, "reg": 0.1},
    {"name": "lightgcn", "dim": 3, "layers": 0, "reg": 0.0},
    {"name": "bprmf", "dim": 8, "reg": 0.1},
]
DATASETS = {"more users": (30, 14, 102, 0), "more items": (9, 40, 52, 1)}
GLOBAL_BATCH, LR = 50, 0.05  # the last batch has 2 rows, so one of 3 workers has none


def features(data: Dataset, method: Any) -> torch.Tensor:
    """X in float64: the chosen sets side by side, each with missing rows filled and rows normalised."""
    sets = []
    for name in method.features:
        values, missing = data.feature_rows(name, 0, data.items)
        rows = values.astype(np.float64)
        if method.fill == "mean":
            rows[missing] = rows[~missing].mean(0)
        norms = np.linalg.norm(rows, axis=1, keepdims=True)
        sets.append(np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0))
    return torch.from_numpy(np.concatenate(sets, 1))


def transcription(engine: Any, data: Dataset) -> Any:
    """A function that maps weights and ids to the named terms, each with its weight."""
    train, method = engine.train_rows, engine.method.config
    if method.name == "bprmf":
        return lambda w, u, p, n: plain.bprmf(w, u, p, n, method.reg)
    if method.name == "lightgcn":
        adjacency = dense(train.user, train.item, data.users, data.items)
        return lambda w, u, p, n: plain.lightgcn(adjacency, w, u, p, n, method.layers, method.reg)
    model = plain.AlignRec(train.user, train.item, data.users, features(data, method), method.model_dump())

    def terms(w: plain.Weights, u: torch.Tensor, p: torch.Tensor, n: torch.Tensor) -> plain.Terms:
        found = model.terms(w, u, p, n, GLOBAL_BATCH)
        weights = {"bpr": 1, "reg": 1, "uia": method.uia_weight, "sim": method.sim_weight}
        weighted = {name: weights.get(name, method.cl_loss) * term for name, term in found.items()}
        return {name: term for name, term in weighted.items() if weights.get(name, method.cl_loss)}

    return terms


def check(folder: str) -> None:
    from distrec.training.engine import Engine

    quiet()
    world = World.current()
    for dataset in DATASETS:
        data = Dataset.open(str(Path(folder, dataset)))
        for case in CASES:
            tree = {"data": folder, "run": {"name": "r"}, "method": case, "train": {"global_batch": GLOBAL_BATCH}}
            engine = Engine(world, data, resolve(decode(RunConfig, tree | {"optimizer": {"lr": LR}})))
            wanted_terms, names = transcription(engine, data), {table: table for table in engine.tables.specs}
            for step in range(engine.steps_per_epoch):
                where = f"{dataset}, {case}, step {step}, rank {world.rank} of {world.size}"
                triples = engine.samples(0, step)
                compare(engine, wanted_terms, names, triples, step, where)
                engine.update()


def compare(engine: Any, wanted_terms: Any, names: dict[str, str], triples: Triples, step: int, where: str) -> None:
    state = engine.dense.state()
    weights = {name: torch.from_numpy(value) for name, value in table_weights(engine, names).items()}
    weights |= {name.removesuffix(".weight"): value for name, value in state.items() if name.endswith(".weight")}
    exact = {name: value.double().requires_grad_() for name, value in weights.items()}
    ids = [torch.from_numpy(getattr(triples, name)) for name in ("users", "positives", "negatives")]
    wanted = wanted_terms(exact, *ids)
    sum(wanted.values()).backward()

    terms, _ = engine.forward_backward(0, step, triples)
    assert terms.keys() == wanted.keys(), where
    for name, value in terms.items():
        assert value == pytest.approx(float(wanted[name].detach()), rel=1e-5, abs=1e-6), f"{name}: {where}"
    found = table_gradients(engine, names) | dense_gradients(engine)
    for name, value in exact.items():
        grad = value.grad if value.grad is not None else torch.zeros_like(value)
        if name not in found:
            assert not grad.abs().max(), f"{name}: {where}"
            continue
        largest = float(grad.abs().max())
        np.testing.assert_allclose(found[name], grad.numpy(), atol=1e-4 * largest, rtol=0, err_msg=f"{name}: {where}")


@pytest.mark.multiprocess
@pytest.mark.parametrize("size", [1, 3])
def test_losses_and_gradients_equal_the_dense_transcription(size: int, tmp_path: Path):
    for name, shape in DATASETS.items():
        write_random(tmp_path / name, *shape)
    run_workers(check, size, str(tmp_path), timeout=400)
