"""STAIR's fixture: the engine in float32, and the same mathematics in float64 on plain tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from distrec.config.run import OptimizerSection, RunConfig
from distrec.data.dataset import Dataset
from distrec.graph.polynomial import decaying_powers, polynomial
from distrec.methods.losses import bpr
from distrec.methods.stair import stepwise_decay
from distrec.tables.optimizers import SmoothedOptimizer
from distrec.training.engine import Engine
from tests.oracle.common import (
    both_ways,
    compare_matrix,
    compare_metrics,
    recorded,
    replay_steps,
    set_table,
    stacked,
    user_item_entries,
)
from tests.oracle.compare import Row, absolute, entries, of_largest, relative
from tests.oracle.fixture import Fixture, run_config, write_dataset
from tests.oracle.gather import table_gradients, table_weights

TABLES = {"P_u": "user", "P_i": "item"}


def dataset(fixture: Fixture, folder: Path) -> Dataset:
    return write_dataset(fixture, folder, {name: fixture[f"data/{name}_feature"] for name in ("text", "image")})


def config(fixture: Fixture, zero_stage: int) -> RunConfig:
    h = fixture.hparam
    method = {
        "name": "stair",
        "neighbours": [h("k_text"), h("k_image")],
        "dim": h("embedding_dim"),
        "layers": h("num_layers"),
        "gamma": h("gamma"),
    }
    return run_config(method, optimizer(fixture).model_dump(), h("batch_size"), zero_stage)


def optimizer(fixture: Fixture) -> OptimizerSection:
    h = fixture.hparam
    return OptimizerSection(
        name="adamw",
        lr=h("learning_rate"),
        betas=[h("adam_beta1"), h("adam_beta2")],
        eps=h("adam_eps"),
        weight_decay=h("weight_decay"),
    )


def replay(fixture: Fixture, engine: Engine) -> list[Row]:
    """Repeat the recorded run. Collective; the rows are the same on every rank."""
    method: Any = engine.method
    upper = user_item_entries(engine, method.user_item.matrix)
    report = [
        entries("graph/A", both_ways(upper, engine.space.users.total), recorded(fixture, "A"), 1e-6),
        compare_matrix(fixture, engine, "S", method.item_item),
        absolute("graph/b", stepwise_decay(method.config.dim, method.config.gamma).numpy(), fixture["graph/b"], 1e-6),
    ]
    report += _initial(fixture, engine)
    for name, table in TABLES.items():
        set_table(engine, table, fixture[f"init/{name}"])
    report += _outputs(fixture, engine, "", 1e-6)

    def gradients() -> list[Row]:
        found = table_gradients(engine, TABLES)
        return [of_largest(f"grad/{name}", found[name], fixture[f"grad/{name}"], 1e-5) for name in TABLES]

    def told(terms: dict[str, float]) -> list[Row]:
        total = np.array(sum(terms.values()))
        return [relative(f"out/{key}", total, fixture[f"out/{key}"], 1e-6) for key in ("loss_bpr", "loss_total")]

    def weights(prefix: str) -> list[Row]:
        found = table_weights(engine, TABLES)
        return [absolute(f"{prefix}/{name}", found[name], fixture[f"{prefix}/{name}"], 1e-5) for name in TABLES]

    every, rows = replay_steps(fixture, engine, told, gradients, lambda: weights("after1"))
    losses = np.array([sum(step.values()) for step in every])
    report += [*rows, absolute("out/loss_steps_f32", losses, fixture["out/loss_steps_f32"], 1e-6)]
    report += weights("after32") + _outputs(fixture, engine, "_after", 1e-5)
    train, valid = engine.train_rows, engine.space.data.interactions("valid")
    masks = {"valid": [train], "test": [train, valid] if fixture.hparam("remove_seen") else [train]}
    report += compare_metrics(fixture, engine, engine.representations(), "", masks)
    return report + in_float64(fixture)


def _initial(fixture: Fixture, engine: Engine) -> list[Row]:
    """Our item vectors with each modality's sign in each column as recorded, and users' vectors from recorded items."""
    method: Any = engine.method
    found = table_weights(engine, TABLES)
    pairs = np.unique(np.stack([fixture["data/train_user"], fixture["data/train_item"]]), axis=1)
    matrix = np.zeros((engine.space.users.total, engine.space.items.total))
    matrix[pairs[0], pairs[1]] = 1
    means = matrix @ found["P_i"] / np.maximum(matrix.sum(1, keepdims=True), 1)
    rows = [absolute("init/P_u from our P_i", found["P_u"], means, 1e-6)]
    # P_i = (k_t F_t + k_v F_v) / (k_t + k_v): the four sign choices are +-P_i and +-(P_i - 2 k_v F_v / (k_t + k_v)).
    second = method.parts[1] if len(method.parts) == 2 else torch.zeros_like(method.initial.items)
    flipped = table_of(engine, method.initial.items - 2 * second)
    choices = [found["P_i"], -found["P_i"], flipped, -flipped]
    wanted = fixture["init/P_i"]
    column = np.min([np.abs(choice - wanted).max(0) for choice in choices], 0)
    return [*rows, absolute("init/P_i up to signs", column, np.zeros_like(column), 1e-4)]


def table_of(engine: Engine, block: torch.Tensor) -> np.ndarray:
    whole: np.ndarray = engine.world.gather_blocks(block, engine.space.items).numpy()
    return whole


def _outputs(fixture: Fixture, engine: Engine, suffix: str, tolerance: float) -> list[Row]:
    final, users = stacked(engine, engine.representations()), engine.space.users.total
    halves = {f"E_u{suffix}": final[:users], f"E_i{suffix}": final[users:]}
    return [absolute(f"out/{name}", half, fixture[f"out/{name}"], tolerance) for name, half in halves.items()]


def in_float64(fixture: Fixture) -> list[Row]:
    """The recorded run with the recorded graphs, in one process: the method's functions on plain float64 tensors."""
    h, users, items = fixture.hparam, fixture.count("users"), fixture.count("items")

    def dense(key: str, size: int) -> torch.Tensor:
        out = torch.zeros(size, size, dtype=torch.float64)
        for (row, column), value in recorded(fixture, key).items():
            out[row, column] = value
        return out

    adjacency, similar = dense("A", users + items), dense("S", items)
    backward = torch.from_numpy(fixture["graph/b"]).double()
    ahead = decaying_powers(1 - backward, h("num_layers"), torch.float64)
    back = decaying_powers(backward, h("num_layers"), torch.float64)
    tables = {name: torch.from_numpy(fixture[f"init/{name}"]).double().requires_grad_() for name in TABLES}
    rule = optimizer(fixture)
    smooths = [lambda x: x.clone(), lambda x: polynomial(lambda y: (similar @ y,), back, x)[0]]
    stepper = SmoothedOptimizer(list(tables.values()), smooths, rule)

    def final() -> tuple[torch.Tensor, torch.Tensor]:
        def forward(x: torch.Tensor) -> torch.Tensor:
            return polynomial(lambda y: (adjacency @ y,), ahead, x)[0]

        whole = forward(torch.cat(list(tables.values())))
        return whole[:users], whole[users:]

    def compare(prefix: str, found: dict[str, torch.Tensor]) -> list[Row]:
        return [
            absolute(f"{prefix}{name} (fp64)", x.detach().numpy(), fixture[f"{prefix}{name}"], 1e-12)
            for name, x in found.items()
        ]

    rows, losses = compare("out/", dict(zip(("E_u", "E_i"), final(), strict=True))), []
    for step, columns in enumerate(zip(*(fixture[f"batch/{name}"] for name in ("users", "pos", "neg")), strict=True)):
        user, positive, negative = (torch.from_numpy(ids) for ids in columns)
        user_vectors, item_vectors = final()
        loss = bpr(user_vectors[user], item_vectors[positive], item_vectors[negative]).mean()
        losses.append(float(loss.detach()))
        stepper.zero_grad()
        loss.backward()
        if step == 0:
            rows += compare("grad/", {name: table.grad for name, table in tables.items()})  # type: ignore[misc]
        stepper.step()
        if step == 0:
            rows += compare("after1/", tables)
    rows += compare("after/", tables) + compare("out/", dict(zip(("E_u_after", "E_i_after"), final(), strict=True)))
    return [*rows, absolute("out/loss_steps (fp64)", np.array(losses), fixture["out/loss_steps"], 1e-9)]
