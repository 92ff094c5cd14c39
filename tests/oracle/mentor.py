"""MENTOR's fixture: names, settings, recorded noise, and the comparisons with their tolerances."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from distrec.config.run import RunConfig
from distrec.data.dataset import Dataset
from distrec.methods.base import Representations
from distrec.methods.batch import Batch
from distrec.methods.mentor import NOISY
from distrec.methods.workspace import Workspace
from distrec.tables.spec import Side
from distrec.training.engine import Engine
from tests.oracle.common import (
    both_ways,
    compare_matrix,
    compare_metrics,
    compare_terms,
    replay_steps,
    set_table,
    stacked,
    user_item_entries,
)
from tests.oracle.compare import Row, absolute, entries, of_largest, relative, trained
from tests.oracle.fixture import Fixture, adam, run_config, write_dataset
from tests.oracle.gather import dense_gradients, table_gradients, table_weights

LAYERS = {"MLP": "first", "MLP_1": "second"}


def theirs(tower: str) -> str:
    """The program's name of a tower: "v_n1" is "v_gcn_n1"."""
    kind, _, number = tower.partition("_")
    return f"{kind}_gcn_{number}" if number else f"{kind}_gcn"


class Recorded:
    """The random draws in the fixture; it has the mask's pattern for the first step only."""

    def __init__(self, fixture: Fixture):
        self._fixture = fixture
        self._first = {"user": 0, "item": fixture.count("users")}

    def noise(self, space: Workspace, batch: Batch, hop: int, side: Side, width: int) -> torch.Tensor:
        start, rows = self._first[side], space.mine(side)
        mine = slice(start + rows.start, start + rows.stop)
        towers = [self._fixture[f"batch/noise_{name}"][batch.step, hop, mine] for name in NOISY]
        return torch.from_numpy(np.concatenate(towers, 1).astype(np.float32))

    def keep(self, space: Workspace, batch: Batch, side: Side, width: int, dropout: float) -> torch.Tensor:
        return space.my_rows(side, torch.from_numpy(self._fixture[f"batch/mask_keep_{side}s"])).float()


def dataset(fixture: Fixture, folder: Path) -> Dataset:
    features = {name: fixture[f"data/{name}_feature"] for name in ("image", "text")}
    return write_dataset(fixture, folder, features)


def config(fixture: Fixture, zero_stage: int) -> RunConfig:
    h = fixture.hparam
    method = {
        "name": "mentor",
        "dim": h("embedding_size"),
        "item_layers": h("n_mm_layers"),
        "knn_k": h("knn_k"),
        "image_weight": h("mm_image_weight"),
        "reg_weight": h("reg_weight"),
        "align_weight": h("align_weight"),
        "mask_weight_f": h("mask_weight_f"),
        "mask_weight_g": h("mask_weight_g"),
        "dropout": h("dropout"),
        "temperature": h("temp"),
        "stale_scores": True,
    }
    return run_config(method, adam(fixture), h("train_batch_size"), zero_stage)


def replay(fixture: Fixture, engine: Engine) -> list[Row]:
    """Repeat the recorded run. Collective; the rows are the same on every rank."""
    h, lr, method = fixture.hparam, engine.config.optimizer.lr, _method(engine)
    _set_weights(fixture, engine)
    method.draws = Recorded(fixture)
    upper = user_item_entries(engine, method.user_item.matrix)
    ones = dict.fromkeys(zip(*fixture["graph/edge_index"].tolist(), strict=True), 1.0)
    edges = {place: 1.0 for place in both_ways(upper, engine.space.users.total)}
    report = [compare_matrix(fixture, engine, "S", method.item_item), entries("graph/edge_index", edges, ones, 0)]
    report += _tables(fixture, engine)
    terms = {
        "bpr": ("loss_bpr", 1.0, 1e-5),
        "reg": ("loss_reg", 1.0, 1e-5),
        "align": ("loss_align_unweighted", h("align_weight"), 5e-6),
        "nce_user": ("loss_nce_user", h("mask_weight_g"), 1e-5),
        "nce_item": ("loss_nce_item", h("mask_weight_g"), 1e-5),
        "mask": ("loss_mask", 1.0, 1e-5),
    }
    every, rows = replay_steps(
        fixture,
        engine,
        lambda found: compare_terms(fixture, found, terms),
        lambda: _gradients(fixture, engine),
    )
    # The mask's value has no gradient, and its draws are recorded for the first step only.
    losses = np.array([sum(value for term, value in step.items() if term != "mask") for step in every])
    losses += fixture["out/loss_mask_steps"]
    report += [*rows, relative("out/loss_steps", losses, fixture["out/loss_steps"], 1e-6)]
    found = _named(engine, table_weights(engine, _TABLES), engine.dense.state(), ".weight")
    for name in fixture.keys("after"):
        report += trained(f"after/{name}", found[name], fixture[f"after/{name}"], 1e-5, lr)
    masks = {split: [engine.train_rows] for split in ("valid", "test")}
    for kind, key in (("stale", "E_stale"), ("fresh", "E_after")):
        final = engine.representations()  # with `stale_scores`: E of the last training step
        report.append(absolute(f"out/{key}", stacked(engine, final), fixture[f"out/{key}"], 1e-5))
        report += compare_metrics(fixture, engine, final, f"{kind}_", masks)
        method.config = method.config.model_copy(update={"stale_scores": False})
    return report


_TABLES = {"preference": "preference", "id_feat": "id", "weight_u": "weight"}


def _method(engine: Engine) -> Any:
    return engine.method


def _set_weights(fixture: Fixture, engine: Engine) -> None:
    towers = _method(engine).towers
    preferences = [fixture[f"init/{theirs(tower)}.preference"] for tower in towers]
    set_table(engine, "preference", np.concatenate(preferences, 1))
    set_table(engine, "id", fixture["init/id_feat"])
    set_table(engine, "weight", fixture["init/weight_u"][..., 0])
    for name, ours in _dense_names(towers).items():
        engine.dense.set_weight(ours, torch.from_numpy(fixture[f"init/{name}"]))
    fixed = engine.dense.module.get_submodule("mask")
    for kind in ("weight", "bias"):
        getattr(fixed, kind).copy_(torch.from_numpy(fixture[f"init/mlp.{kind}"]))


def _dense_names(towers: list[str]) -> dict[str, str]:
    return {
        f"{theirs(tower)}.{layer}.{kind}": f"{ours}.{tower}.{kind}"
        for tower in towers
        for layer, ours in LAYERS.items()
        for kind in ("weight", "bias")
    }


def _named(engine: Engine, tables: dict[str, np.ndarray], dense: dict[str, Any], suffix: str) -> dict[str, np.ndarray]:
    """Tables and dense tensors under the program's names."""
    towers, dim = _method(engine).towers, engine.config.method["dim"]
    found = {"id_feat": tables["id_feat"], "weight_u": tables["weight_u"][..., None]}
    for number, tower in enumerate(towers):
        found[f"{theirs(tower)}.preference"] = tables["preference"][:, number * dim : (number + 1) * dim]
    return found | {name: np.asarray(dense[ours + suffix]) for name, ours in _dense_names(towers).items()}


def _tables(fixture: Fixture, engine: Engine) -> list[Row]:
    method = _method(engine)
    batch = engine.batches(0, 0, _first_triples(fixture))[0]
    dim = engine.config.method["dim"]
    with torch.no_grad():
        views = method.views(batch)
        final = method.final(views, 0)
        moments = method.moments(views, final)
        found = {"E": final}
        if method.noisy:
            found |= {"E_noisy1": method.final(views, 3), "E_noisy2": method.final(views, 5)}
    for number, name in enumerate(("E_visual", "E_textual", "E_guide")):
        columns = slice(number * dim, (number + 1) * dim)
        found[name] = Representations(*(torch.cat([rows[:, columns]] * 2, 1) for rows in (views.users, views.items)))
    rows = [
        absolute(f"out/{name}", stacked(engine, view), fixture[f"out/{name}"], 1e-6) for name, view in found.items()
    ]
    return [*rows, absolute("out/moments", moments.numpy(), fixture["out/moments"], 1e-6)]


def _first_triples(fixture: Fixture) -> Any:
    from distrec.data.sampling import Triples

    return Triples(*(fixture[f"batch/{name}"][0] for name in ("users", "pos", "neg")), rows=np.empty(0, np.int64))


def _gradients(fixture: Fixture, engine: Engine) -> list[Row]:
    found = _named(engine, table_gradients(engine, _TABLES), dense_gradients(engine), "")
    rows = [of_largest(f"grad/{name}", found[name], fixture[f"grad/{name}"], 1e-4) for name in fixture.keys("grad")]
    untrained = set(fixture["nograd"].tolist()) & set(found)
    return [*rows, Row("nograd", float(len(untrained)), 0.0, "names trained here but not there")]
