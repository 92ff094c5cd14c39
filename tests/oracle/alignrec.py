"""AlignRec's fixture: names, settings, and what to compare with which tolerance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from distrec.config.run import RunConfig
from distrec.data.dataset import Dataset
from distrec.data.sampling import Triples
from distrec.evaluation.ranking import Evaluator
from distrec.training.engine import Engine
from tests.oracle.compare import Row, absolute, entries, of_largest, relative, trained
from tests.oracle.fixture import Fixture, run_config, write_dataset
from tests.oracle.gather import dense_gradients, rows_of, sparse_entries, table_gradients, table_weights

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
    optimizer = {
        "name": "adam",
        "lr": h("learning_rate"),
        "betas": [h("adam_beta1"), h("adam_beta2")],
        "eps": h("adam_eps"),
        "weight_decay": h("weight_decay"),
    }
    return run_config(method, optimizer, h("train_batch_size"), zero_stage)


def replay(fixture: Fixture, engine: Engine) -> list[Row]:
    """Repeat the recorded run; collective, the rows are the same on every rank."""
    lr = engine.config.optimizer.lr
    for name, table in TABLES.items():
        rows_of(engine, table).copy_(_mine(engine, table, fixture[f"init/{name}"]))
    for name, ours in DENSE.items():
        engine.dense.set_weight(ours, torch.from_numpy(fixture[f"init/{name}"]))
    report = _graphs(fixture, engine)
    report += _representations(fixture, engine, "", before=True)

    losses: list[float] = []
    for step in range(len(fixture["batch/users"])):
        triples = Triples(
            *(fixture[f"batch/{name}"][step] for name in ("users", "pos", "neg")), rows=np.empty(0, np.int64)
        )
        share, terms, _ = engine.forward(engine.batch(0, step, triples))
        losses.append(sum(terms.values()))
        if step == 0:
            report += _terms(fixture, terms)
        engine.dense.backward(share)
        if step == 0:
            report += _gradients(fixture, engine)
        engine.tables.step(lr)
        engine.dense.step(lr)
        if step == 0:
            report += _weights(fixture, engine, "after1", lr)
    report.append(relative("out/loss_steps", np.array(losses), fixture["out/loss_steps"], 1e-6))
    report += _weights(fixture, engine, "after", lr)
    report += _representations(fixture, engine, "_after", before=False)
    return report + _metrics(fixture, engine)


def _mine(engine: Engine, table: str, values: np.ndarray) -> torch.Tensor:
    partition, rank = engine.tables.partition(table), engine.world.rank
    return torch.from_numpy(values[partition.start(rank) : partition.stop(rank)])


def _graphs(fixture: Fixture, engine: Engine) -> list[Row]:
    method: Any = engine.method
    found_r, found_s = (
        sparse_entries(engine.world, method.user_item.matrix),
        sparse_entries(engine.world, method.item_item),
    )
    if engine.space.users.rows < engine.space.items.rows:  # the longer side is the row side
        found_r = {(user, item): value for (item, user), value in found_r.items()}
    users = engine.space.users.rows
    both = {(u, users + i): v for (u, i), v in found_r.items()} | {(users + i, u): v for (u, i), v in found_r.items()}
    found = {"Rhat": found_r, "Ahat": both, "S": found_s}
    rows = []
    for name, ours in found.items():
        row, column = fixture[f"graph/{name}_indices"]
        theirs: dict[tuple[int, int], float] = {}
        for r, c, value in zip(row.tolist(), column.tolist(), fixture[f"graph/{name}_values"].tolist(), strict=True):
            theirs[r, c] = theirs.get((r, c), 0.0) + value
        rows.append(entries(f"graph/{name}", ours, theirs, 1e-6))
    return rows


def _representations(fixture: Fixture, engine: Engine, suffix: str, before: bool) -> list[Row]:
    method: Any = engine.method
    with torch.no_grad():
        ids, content = method.views()
        final = engine.representations()
    whole = engine.world.gather_blocks
    space = engine.space
    rows = [
        absolute(
            f"out/H_users{suffix}",
            whole(final.users, space.users).numpy(),
            fixture[f"out/H_users{suffix}"],
            1e-6 if before else 1e-5,
        ),
        absolute(
            f"out/H_items{suffix}",
            whole(final.items, space.items).numpy(),
            fixture[f"out/H_items{suffix}"],
            1e-6 if before else 1e-5,
        ),
    ]
    if before:
        for name, view in (("H_id", ids), ("H_mm", content)):
            stacked = torch.cat([whole(view.users, space.users), whole(view.items, space.items)]).numpy()
            rows.append(absolute(f"out/{name}", stacked, fixture[f"out/{name}"], 1e-6))
    return rows


def _terms(fixture: Fixture, terms: dict[str, float]) -> list[Row]:
    h = fixture.hparam
    weights = {
        "bpr": ("loss_bpr", 1.0),
        "reg": ("loss_reg", 1.0),
        "cca_item": ("loss_cca_item", h("cl_loss")),
        "cca_user": ("loss_cca_user", h("cl_loss")),
        "uia": ("loss_uia_unweighted", h("ui_cosine_loss_weight")),
        "sim": ("loss_sim", h("sim_weight")),
    }
    rows = [
        relative(f"out/{key}", np.array(terms[term] / weight), fixture[f"out/{key}"], 1e-5)
        for term, (key, weight) in weights.items()
        if term in terms
    ]
    return [*rows, relative("out/loss_total", np.array(sum(terms.values())), fixture["out/loss_total"], 1e-5)]


def _gradients(fixture: Fixture, engine: Engine) -> list[Row]:
    found = {name: value for name, value in table_gradients(engine, TABLES).items()}
    dense = dense_gradients(engine)
    found |= {name: dense[ours] for name, ours in DENSE.items()}
    rows = [of_largest(f"grad/{name}", found[name], fixture[f"grad/{name}"], 1e-4) for name in fixture.keys("grad")]
    untrained = set(fixture["nograd"].tolist()) & set(found)
    return [*rows, Row("nograd", float(len(untrained)), 0.0, "names trained here but not there")]


def _weights(fixture: Fixture, engine: Engine, prefix: str, lr: float) -> list[Row]:
    found = table_weights(engine, TABLES)
    dense = engine.dense.state()
    found |= {name: dense[f"{ours}.weight"].numpy() for name, ours in DENSE.items()}
    names = fixture.keys(prefix)
    return [
        row for name in names for row in trained(f"{prefix}/{name}", found[name], fixture[f"{prefix}/{name}"], 1e-5, lr)
    ]


def _metrics(fixture: Fixture, engine: Engine) -> list[Row]:
    names = fixture.keys("metrics")
    ks = sorted({int(name.rpartition("@")[2]) for name in names})
    final, rows = engine.representations(), []
    for split in ("valid", "test"):
        held_out = engine.space.data.interactions(split)
        evaluator = Evaluator(engine.world, engine.space.users, engine.space.items, held_out, [engine.train_rows], ks)
        metrics = evaluator.rank(final.users, final.items, engine.method.score).metrics()
        for name in names:
            if name.startswith(f"{split}_"):
                key = f"metrics/{name}"
                rows.append(absolute(key, np.array(metrics[name.removeprefix(f"{split}_")]), fixture[key], 1e-6))
    return rows
