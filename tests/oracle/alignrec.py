"""AlignRec's fixture: names, settings, and the comparisons with their tolerances."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from distrec.config.run import RunConfig
from distrec.data.dataset import Dataset
from distrec.training.engine import Engine
from tests.oracle.common import (
    both_ways,
    compare_metrics,
    compare_terms,
    recorded,
    replay_steps,
    set_table,
    stacked,
    user_item_entries,
)
from tests.oracle.compare import Row, absolute, entries, of_largest, relative, trained
from tests.oracle.fixture import Fixture, adam, run_config, write_dataset
from tests.oracle.gather import dense_gradients, sparse_entries, table_gradients, table_weights

TABLES = {"user_embedding.weight": "user", "item_id_embedding.weight": "item", "mm_embedding.weight": "content"}
DENSE = {
    "mm_trs.weight": "mm_trs.weight",
    "mm_trs.bias": "mm_trs.bias",
    "gate_v.0.weight": "gate_v.weight",
    "gate_v.0.bias": "gate_v.bias",
}


def dataset(fixture: Fixture, folder: Path) -> Dataset:
    return write_dataset(fixture, folder, {"content": fixture["data/feature"]})


def config(fixture: Fixture, zero_stage: int) -> RunConfig:
    h = fixture.hparam
    method = {
        "name": "alignrec",
        "features": ["content"],
        "dim": h("embedding_size"),
        "user_item_layers": h("n_ui_layers"),
        "item_layers": h("n_layers"),
        "knn_k": h("knn_k"),
        "reg_weight": h("reg_weight"),
        "uia_weight": h("ui_cosine_loss_weight"),
        "cl_loss": h("cl_loss"),
        "cca_temperature": h("cca_temperature"),
        "sim_weight": h("sim_weight"),
        "side_emb_div": float(h("side_emb_div")),
    }
    return run_config(method, adam(fixture), h("train_batch_size"), zero_stage)


def replay(fixture: Fixture, engine: Engine) -> list[Row]:
    """Repeat the recorded run. Collective; the rows are the same on every rank."""
    h, lr = fixture.hparam, engine.config.optimizer.lr
    for name, table in TABLES.items():
        set_table(engine, table, fixture[f"init/{name}"])
    for name, ours in DENSE.items():
        engine.dense.set_weight(ours, torch.from_numpy(fixture[f"init/{name}"]))
    report = _graphs(fixture, engine)
    report += _representations(fixture, engine, "", before=True)
    terms = {
        "bpr": ("loss_bpr", 1.0, 1e-5),
        "reg": ("loss_reg", 1.0, 1e-5),
        "cca_item": ("loss_cca_item", h("cl_loss"), 1e-5),
        "cca_user": ("loss_cca_user", h("cl_loss"), 1e-5),
        "uia": ("loss_uia_unweighted", h("ui_cosine_loss_weight"), 1e-5),
        "sim": ("loss_sim", h("sim_weight"), 1e-5),
    }
    every, rows = replay_steps(
        fixture,
        engine,
        lambda found: compare_terms(fixture, found, terms),
        lambda: _gradients(fixture, engine),
        lambda: _weights(fixture, engine, "after1", lr),
    )
    losses = np.array([sum(step.values()) for step in every])
    report += [*rows, relative("out/loss_steps", losses, fixture["out/loss_steps"], 1e-6)]
    report += _weights(fixture, engine, "after", lr)
    report += _representations(fixture, engine, "_after", before=False)
    masks = {split: [engine.train_rows] for split in ("valid", "test")}
    return report + compare_metrics(fixture, engine, engine.representations(), "", masks)


def _graphs(fixture: Fixture, engine: Engine) -> list[Row]:
    method: Any = engine.method
    upper = user_item_entries(engine, method.user_item.matrix)
    found = {"Rhat": upper, "Ahat": both_ways(upper, engine.space.users.total)}
    found["S"] = sparse_entries(engine.world, method.item_item)
    return [entries(f"graph/{name}", ours, recorded(fixture, name), 1e-6) for name, ours in found.items()]


def _representations(fixture: Fixture, engine: Engine, suffix: str, before: bool) -> list[Row]:
    method: Any = engine.method
    with torch.no_grad():
        ids, content = method.views()
    final, users = stacked(engine, engine.representations()), engine.space.users.total
    tolerance = 1e-6 if before else 1e-5
    halves = {"H_users": final[:users], "H_items": final[users:]}
    rows = [
        absolute(f"out/{name}{suffix}", half, fixture[f"out/{name}{suffix}"], tolerance)
        for name, half in halves.items()
    ]
    views = {"H_id": ids, "H_mm": content} if before else {}
    return rows + [
        absolute(f"out/{name}", stacked(engine, view), fixture[f"out/{name}"], 1e-6) for name, view in views.items()
    ]


def _gradients(fixture: Fixture, engine: Engine) -> list[Row]:
    found, dense = table_gradients(engine, TABLES), dense_gradients(engine)
    found |= {name: dense[ours] for name, ours in DENSE.items()}
    rows = [of_largest(f"grad/{name}", found[name], fixture[f"grad/{name}"], 1e-4) for name in fixture.keys("grad")]
    untrained = set(fixture["nograd"].tolist()) & set(found)
    return [*rows, Row("nograd", float(len(untrained)), 0.0, "names trained here but not there")]


def _weights(fixture: Fixture, engine: Engine, prefix: str, lr: float) -> list[Row]:
    found, dense = table_weights(engine, TABLES), engine.dense.state()
    found |= {name: dense[f"{ours}.weight"].numpy() for name, ours in DENSE.items()}
    return [
        row
        for name in fixture.keys(prefix)
        for row in trained(f"{prefix}/{name}", found[name], fixture[f"{prefix}/{name}"], 1e-5, lr)
    ]
