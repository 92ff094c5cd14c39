"""Our own fixtures: AlignRec computed densely in float64, in the layout of the published fixtures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.methods.plain_alignrec import AlignRec

NAMES = {
    "user_embedding.weight": "user",
    "item_id_embedding.weight": "item",
    "mm_embedding.weight": "content",
    "mm_trs.weight": "mm_trs.weight",
    "mm_trs.bias": "mm_trs.bias",
    "gate_v.0.weight": "gate_v.weight",
    "gate_v.0.bias": "gate_v.bias",
}


def write_fixture(
    path: Path, users: int, items: int, width: int, batch: int, hparams: dict[str, Any], seed: int
) -> str:
    """Random interactions, features, weights and batches, and the results of plain autograd and Adam."""
    rng = np.random.default_rng(seed)
    h = {
        "n_layers": 1, "n_ui_layers": 2, "knn_k": 10, "embedding_size": 8, "cl_loss": 0.01, "sim_weight": 0.2,
        "reg_weight": 1e-4, "ui_cosine_loss_weight": 0.1, "cca_temperature": 0.2, "side_emb_div": 0,
        "learning_rate": 1e-3, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_eps": 1e-8, "weight_decay": 0.0,
        "train_batch_size": batch, "steps": 8,
    } | hparams  # fmt: skip
    out: dict[str, Any] = {f"hparams/{name}": np.array(value) for name, value in h.items()}
    out |= {"data/n_users": np.array(users), "data/n_items": np.array(items)}
    grid = rng.permutation(users * items)
    counts = {"train": 4 * max(users, items), "valid": users, "test": users + 5}
    start = 0
    for split, count in counts.items():
        keys = grid[start : start + count]
        start += count
        out[f"data/{split}_user"], out[f"data/{split}_item"] = keys // items, keys % items
    features = rng.normal(size=(items, width)).astype(np.float32)
    out["data/feature"] = features
    shapes = {"user": (users, h["embedding_size"]), "item": (items, h["embedding_size"])}
    shapes |= {"mm_trs.weight": (h["embedding_size"], width), "mm_trs.bias": (h["embedding_size"],)}
    shapes |= {"gate_v.weight": (h["embedding_size"],) * 2, "gate_v.bias": (h["embedding_size"],)}
    start_values = {name: rng.normal(size=shape, scale=0.3).astype(np.float32) for name, shape in shapes.items()}
    start_values["content"] = features
    chosen = rng.integers(0, counts["train"], (h["steps"], batch - 3))  # fewer than the configured batch
    triples = out["data/train_user"][chosen], out["data/train_item"][chosen], rng.integers(0, items, chosen.shape)
    out |= dict(zip(("batch/users", "batch/pos", "batch/neg"), triples, strict=True))
    out["nograd"] = np.array(["query_common.0.weight"])

    config = {
        "user_item_layers": h["n_ui_layers"], "item_layers": h["n_layers"], "moving_target": True, "layer_norm": False,
        "uia_weight": h["ui_cosine_loss_weight"],
    } | h  # fmt: skip
    train = out["data/train_user"], out["data/train_item"]
    model = AlignRec(*train, users, torch.from_numpy(features), config)
    for name, matrix in (("Ahat", model.adjacency), ("Rhat", model.r_hat), ("S", model.s)):
        indices = matrix.nonzero().t()
        out[f"graph/{name}_indices"], out[f"graph/{name}_values"] = indices.numpy(), matrix[tuple(indices)].numpy()
    weights = {name: torch.from_numpy(value).double().requires_grad_() for name, value in start_values.items()}

    def keep(prefix: str, tensors: dict[str, torch.Tensor]) -> None:
        for theirs, ours in NAMES.items():
            out[f"{prefix}/{theirs}"] = tensors[ours].detach().numpy().copy()

    def outputs(suffix: str) -> torch.Tensor:
        with torch.no_grad():
            ids, content = model.views(weights)
        out[f"out/H_users{suffix}"], out[f"out/H_items{suffix}"] = (
            (ids + content).numpy()[:users],
            (ids + content).numpy()[users:],
        )
        if not suffix:
            out["out/H_id"], out["out/H_mm"] = ids.numpy(), content.numpy()
        return ids + content

    keep("init", weights)
    outputs("")
    adam = torch.optim.Adam(weights.values(), lr=h["learning_rate"], foreach=False)
    losses = []
    for step in range(h["steps"]):
        terms = model.terms(weights, *(torch.from_numpy(ids[step]) for ids in triples), configured=batch)
        total = model.total(terms)
        losses.append(float(total.detach()))
        adam.zero_grad()
        total.backward()
        if step == 0:
            names = {"uia": "loss_uia_unweighted"}
            out |= {f"out/{names.get(name, f'loss_{name}')}": term.detach().numpy() for name, term in terms.items()}
            out["out/loss_total"] = total.detach().numpy()
            keep("grad", {name: weight.grad for name, weight in weights.items()})  # type: ignore[misc]
        adam.step()
        if step == 0:
            keep("after1", weights)
    keep("after", weights)
    out["out/loss_steps"] = np.array(losses)
    scores = outputs("_after")
    out |= metrics(scores[:users] @ scores[users:].t(), out, users)
    np.savez(path, **out)
    return str(path)


def metrics(scores: torch.Tensor, data: dict[str, Any], users: int) -> dict[str, float]:
    """The metrics of docs/methods/alignrec.md section 5.3 at 5, 10 and 20, by a loop over users."""
    found: dict[str, list[float]] = {}
    for split in ("valid", "test"):
        for user in range(users):
            held = set(data[f"data/{split}_item"][data[f"data/{split}_user"] == user].tolist())
            if not held:
                continue
            row = scores[user].clone()
            row[data["data/train_item"][data["data/train_user"] == user]] = -1e10
            hits = np.array([item in held for item in row.argsort(descending=True)[:20].tolist()], float)
            for k in (5, 10, 20):
                top, shorter = np.append(hits, np.zeros(20))[:k], min(k, len(held))
                discount = 1 / np.log2(np.arange(2, k + 2))
                precision = np.cumsum(top) / np.arange(1, k + 1)
                values = {
                    "recall": top.sum() / len(held),
                    "ndcg": (top * discount).sum() / discount[:shorter].sum(),
                    "precision": top.sum() / k,
                    "map": (top * precision).sum() / shorter,
                }
                for name, value in values.items():
                    found.setdefault(f"metrics/{split}_{name}@{k}", []).append(value)
    return {name: np.array(np.mean(values)) for name, values in found.items()}  # type: ignore[misc]
