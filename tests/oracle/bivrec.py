"""BiVRec's fixture, two runs of the released prototype: names, settings, recorded noise, and the comparisons.

Section numbers in brackets refer to docs/methods/bivrec.md.

The program pads histories on the right; here they are padded on the left. The prototype reads a history as a set, so
only the recorded random draws must be moved: those of a row with n items are rotated by n places.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from distrec.config.run import RunConfig
from distrec.data.dataset import Dataset
from distrec.data.manifest import CONTEXT
from distrec.data.sampling import Windows
from distrec.evaluation.ranking import Evaluator, Ranked
from distrec.methods.base import Representations
from distrec.methods.batch import WindowBatch
from distrec.training.engine import Engine
from tests.oracle.common import set_table
from tests.oracle.compare import Row, absolute, of_largest, relative
from tests.oracle.fixture import Fixture, adam, run_config, write
from tests.oracle.gather import dense_gradients, table_gradients, table_weights

SPLITS, MODALITIES = ("train", "valid", "test"), ("image", "text")
LAYERS = {
    "image_layer": "content.each.0",
    "text_layer": "content.each.1",
    "both_dim": "content.both",
    "norm": "views.id.norm",
    "norm_mm": "views.mm.norm",
    "tokens_norm": "norm",
}
BLOCK = {
    "norm_tokens": "norm",
    "assign.q_proj": "query",
    "assign.k_proj": "key",
    "assign.v_proj": "value",
    "assign.proj": "out",
    "norm_new_x": "norm_out",
}
for _view, _theirs in (("id", "assignment"), ("mm", "assignment_mm")):
    LAYERS |= {f"{_theirs}.{name}": f"views.{_view}.cluster.{ours}" for name, ours in BLOCK.items()}
    LAYERS |= {f"head_{_view}.fc1": f"heads.{_view}.0", f"head_{_view}.fc2": f"heads.{_view}.3"}
TOKENS = {"group_token": "views.id.tokens", "mm_tokens": "views.mm.tokens"}
TABLE = "embeddings.weight"


def runs(fixture: Fixture) -> dict[str, Fixture]:
    """The runs in a file, by the prefix of their keys."""
    return {"": fixture} | ({"close/": fixture.under("close")} if fixture.keys("close") else {})


class Recorded:
    """The Gumbel draws in the fixture; users of other splits, which have none, get zeros."""

    def __init__(self, fixture: Fixture):
        self._fixture, self._first = fixture, first_users(fixture)

    def training(self, batch: WindowBatch, view: str, interests: int, tokens: int) -> torch.Tensor:
        real = self._fixture["batch/mask"][batch.step]
        draws = _moved(self._fixture[f"batch/gumbel_{view}"][batch.step], real)
        return batch.my_rows(torch.from_numpy(draws))

    def evaluation(self, users: np.ndarray, view: str, interests: int, tokens: int) -> torch.Tensor:
        every = np.zeros((self._first["end"], interests, tokens), np.float32)
        for split in SPLITS[1:]:
            draws = _moved(self._fixture[f"batch/{split}_gumbel_{view}"], self._fixture[f"batch/{split}_mask"])
            every[self._first[split] : self._first[split] + len(draws)] = draws
        return torch.from_numpy(every[users])


def _moved(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Rows `[rows, …, length]` that are padded on the right, as rows that are padded on the left."""
    return np.stack([np.roll(row, length - count, -1) for row, count, length in _rows(values, mask)])


def _rows(values: np.ndarray, mask: np.ndarray) -> list[tuple[np.ndarray, int, int]]:
    counts = mask.sum(1).astype(int)
    if not all((row[:count] == 1).all() for row, count in zip(mask, counts, strict=True)):
        raise ValueError("a mask has a gap")
    return [(row, count, mask.shape[1]) for row, count in zip(values, counts, strict=True)]


def windows(items: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Recorded histories in our form: the newest item last, and -1 for padding."""
    return _moved(np.where(mask == 1, items, -1), mask)


def first_users(fixture: Fixture) -> dict[str, int]:
    """Our number of each split's first user, and the number after the last; each split has its own users."""
    counts = [len(fixture[f"data/{split}_lengths"]) for split in SPLITS]
    return dict(zip((*SPLITS, "end"), np.concatenate([[0], np.cumsum(counts)]).tolist(), strict=True))


def dataset(fixture: Fixture, folder: Path) -> Dataset:
    """The first items of valid and test users are given as history; the rest is held out."""
    first = first_users(fixture)
    rows: dict[str, list[tuple[int, int]]] = {name: [] for name in (*SPLITS, CONTEXT)}
    for split in SPLITS:
        for number, sequence in enumerate(fixture[f"data/{split}_sequences"], first[split]):
            items = sequence[: fixture[f"data/{split}_lengths"][number - first[split]]].tolist()
            known = len(items) if split == "train" else int(0.8 * len(items))
            rows["train" if split == "train" else CONTEXT] += [(number, item) for item in items[:known]]
            rows[split] += [(number, item) for item in items[known:]]
    columns = {name: np.array(pairs, np.int64).reshape(-1, 2).T for name, pairs in rows.items()}
    splits = {name: (user, item, np.zeros(len(user), np.int64)) for name, (user, item) in columns.items()}
    features = {name: fixture[f"data/{name}_feature"] for name in MODALITIES if f"data/{name}_feature" in fixture}
    return write(folder, first["end"], fixture.count("items"), splits, features, {})


def config(fixture: Fixture, zero_stage: int) -> RunConfig:
    h = fixture.hparam
    method = {
        "name": "bivrec",
        "level": "prototype",
        "modality": h("modality"),
        "mm_type": h("mm_type"),
        "dim": h("hidden_size"),
        "interests": h("interest_num"),
        "length": h("seq_len"),
        "gumbel": h("gumbel"),
        "tau": h("gumbel_tau"),
        "shelter": h("shelter"),
        "temperature": h("contrastive_temperature"),
        "dropout": h("dropout"),
        "lambda_id": h("lambda1"),
        "lambda_c": h("lambda2"),
        "pad_collision": bool(h("pad_collision")),
    }
    return run_config(method, adam(fixture), h("batch_size"), zero_stage)


def replay(fixture: Fixture, engine: Engine) -> list[Row]:
    """Repeat the recorded runs. Collective; the rows are the same on every rank."""
    stage, report = engine.config.dense.zero_stage, []
    for prefix, run in runs(fixture).items():
        own = engine if not prefix else Engine(engine.world, engine.space.data, config(run, stage))
        report += [Row(prefix + row.key, row.difference, row.tolerance, row.measure) for row in _run(run, own)]
    return report


def _run(fixture: Fixture, engine: Engine) -> list[Row]:
    h, method = fixture.hparam, _method(engine)
    method.draws = Recorded(fixture)
    names = _dense_names(fixture, engine)
    set_table(engine, "item", fixture[f"init/{TABLE}"])
    for theirs, ours in names.items():
        engine.dense.set_weight(ours, torch.from_numpy(fixture[f"init/{theirs}"]).squeeze(0))
    for kind in ("weight", "bias"):
        getattr(engine.dense.module, f"target_{kind}").copy_(torch.from_numpy(fixture[f"init/target_norm.{kind}"]))
    report, every, norms = [], [], []
    for step, target in enumerate(fixture["batch/target"]):
        history = windows(fixture["batch/items"][step], fixture["batch/mask"][step])
        items = np.concatenate([history, target[:, None]], 1)
        nobody = np.zeros(len(target), np.int64)
        samples = Windows(nobody, items, np.empty(0, np.int64))
        report += _outputs(fixture, engine, engine.batches(0, step, samples)[0]) if step == 0 else []
        terms, _ = engine.forward_backward(0, step, samples)
        every.append(terms)
        if step == 0:
            report += _terms(fixture, terms)
        found = table_gradients(engine, {TABLE: "item"}) | dense_gradients(engine)
        norms.append(sum(float(np.square(grad.astype(np.float64)).sum()) for grad in found.values()) ** 0.5)
        report += _gradients(fixture, engine, names) if step == 0 else []
        engine.update()
    for key, weight, values in (
        ("loss_rec_steps", h("lambda1"), [terms["ce_id"] for terms in every]),
        ("loss_con_steps", h("lambda2"), [terms["contrast"] for terms in every]),
        ("loss_steps", 1.0, [sum(terms.values()) for terms in every]),
    ):
        report.append(relative(f"out/{key}", np.array(values), weight * fixture[f"out/{key}"], 1e-6))
    report.append(relative("out/grad_norm_steps", np.array(norms), fixture["out/grad_norm_steps"], 1e-4))
    return report + _weights(fixture, engine, names) + _rankings(fixture, engine)


def _terms(fixture: Fixture, terms: dict[str, float]) -> list[Row]:
    found = {
        "loss_rec": (fixture.hparam("lambda1"), terms["ce_id"]),
        "loss_con": (fixture.hparam("lambda2"), terms["contrast"]),
        "loss_total": (1.0, sum(terms.values())),
    }
    return [
        relative(f"out/{key}", np.array(value), weight * fixture[f"out/{key}"], 1e-6)
        for key, (weight, value) in found.items()
    ]


def _method(engine: Engine) -> Any:
    return engine.method


def _dense_names(fixture: Fixture, engine: Engine) -> dict[str, str]:
    """Our name for each of the program's weights that the method has."""
    layers = {f"{theirs}.{kind}": f"{ours}.{kind}" for theirs, ours in LAYERS.items() for kind in ("weight", "bias")}
    if engine.config.method["modality"] == "text":
        layers |= {f"text_layer.{kind}": f"content.each.0.{kind}" for kind in ("weight", "bias")}
        layers = {theirs: ours for theirs, ours in layers.items() if not theirs.startswith("image_layer")}
    ours = {name.removesuffix(".weight") for name in engine.dense.state() if name.endswith(".weight")}
    return {theirs: name for theirs, name in (layers | TOKENS).items() if name in ours}


def _outputs(fixture: Fixture, engine: Engine, batch: WindowBatch) -> list[Row]:
    method, counts = _method(engine), batch.counts
    with torch.no_grad():
        seen = engine.dense(lambda net: method._read(net, batch))
        keys = {"z_id": "z_id", "z_mm": "z_mm", "interests": "interests_id"}
        found = {f"out/{key}": engine.world.gather_rows(seen[ours], counts) for key, ours in keys.items()}
        u = engine.world.gather_rows(seen["interest_id"], counts)
    found["out/scores"] = u @ torch.from_numpy(fixture[f"init/{TABLE}"]).t()
    rows = [absolute(key, values.numpy(), fixture[key], 1e-5) for key, values in found.items()]
    unit = [torch.nn.functional.normalize(found[f"out/z_{view}"].double(), dim=1) for view in ("id", "mm")]
    similar = unit[0] @ unit[1].t() / fixture.hparam("contrastive_temperature")
    clip = (similar.logsumexp(1) - similar.diagonal()).mean()
    key = "out/loss_con_intended_clip_row"
    return [*rows, relative(key, np.array(float(clip)), fixture[key], 1e-6)]


def _skipped(fixture: Fixture) -> set[str]:
    """The biases whose true gradient is zero, so that the program's updates are rounding noise."""
    return set(fixture["noisegrad"].tolist()) if "noisegrad" in fixture else set()


def _gradients(fixture: Fixture, engine: Engine, names: dict[str, str]) -> list[Row]:
    dense = dense_gradients(engine)
    found = table_gradients(engine, {TABLE: "item"}) | {theirs: dense[ours] for theirs, ours in names.items()}
    rows = [
        of_largest(f"grad/{name}", found[name].reshape(fixture[f"grad/{name}"].shape), fixture[f"grad/{name}"], 1e-5)
        for name in fixture.keys("grad")
        if name not in _skipped(fixture)
    ]
    untrained = set(fixture["nograd"].tolist()) & set(found)
    return [*rows, Row("nograd", float(len(untrained)), 0.0, "names trained here but not there")]


def _weights(fixture: Fixture, engine: Engine, names: dict[str, str]) -> list[Row]:
    state = engine.dense.state()
    found = table_weights(engine, {TABLE: "item"})
    found |= {theirs: state[f"{ours}.weight"].numpy() for theirs, ours in names.items()}
    return [
        absolute(f"after/{name}", found[name].reshape(fixture[f"after/{name}"].shape), fixture[f"after/{name}"], 1e-4)
        for name in fixture.keys("after")
        if name not in _skipped(fixture)
    ]


def _rankings(fixture: Fixture, engine: Engine) -> list[Row]:
    rows, first, k = [], first_users(fixture), fixture.hparam("topk")
    space, world = engine.space, engine.world
    for split in SPLITS[1:]:
        final, users = (
            engine.representations(split),
            slice(first[split], first[split] + len(fixture[f"data/{split}_lengths"])),
        )  # type: ignore[arg-type]
        numbers = np.arange(users.start, users.stop)
        newest = engine.histories(split).newest(numbers, engine.config.method["length"])  # type: ignore[arg-type]
        wanted = windows(fixture[f"batch/{split}_items"], fixture[f"batch/{split}_mask"])
        rows.append(Row(f"batch/{split}_items", float((newest != wanted).sum()), 0.0, "items that differ"))
        whole = world.gather_blocks(final.users.contiguous(), space.users)[users, 0, :, : engine.config.method["dim"]]
        rows.append(
            absolute(f"out/{split}_interests_after", whole.numpy(), fixture[f"out/{split}_interests_after"], 1e-4)
        )
        held_out = space.data.interactions(split)  # type: ignore[arg-type]
        ranked = Evaluator(world, space.users, space.items, held_out, [], [k]).rank(
            final.users, final.items, engine.method.score
        )
        found = {
            "inner_product": metrics(ranked, k),
            "l2_released": metrics(released(ranked, whole, final, engine, first[split], k), k),
        }
        for kind, values in found.items():
            for name, value in values.items():
                key = f"metrics/{kind}_{split}_{name}@{k}"
                rows.append(absolute(key, np.array(value), fixture[key], 1e-6))
    return rows


def released(
    ranked: Ranked, interests: torch.Tensor, final: Representations, engine: Engine, first: int, k: int
) -> Ranked:
    """The ranking of the released index (5): each interest retrieves its k nearest items by distance, and of all
    retrieved ones the farthest come first. It is here for comparison only; nothing of it is in the package.
    """
    items = engine.world.gather_blocks(final.items, engine.space.items)[:, 0, : interests.shape[-1]]
    rank = np.full(len(ranked.item), k)
    for user, start, stop in zip(ranked.user, ranked.offsets[:-1], ranked.offsets[1:], strict=True):
        distance = (interests[user - first].unsqueeze(1) - items).square().sum(-1)
        nearest = distance.topk(k, largest=False)
        order = nearest.values.flatten().argsort(descending=True, stable=True)
        listed = list(dict.fromkeys(item for item in nearest.indices.flatten()[order].tolist() if item != 0))[:k]
        for pair in range(start, stop):
            if ranked.item[pair] in listed:
                rank[pair] = listed.index(ranked.item[pair])
    return Ranked(ranked.ks, ranked.user, ranked.offsets, ranked.item, rank, ranked.masked)


def metrics(ranked: Ranked, k: int) -> dict[str, float]:
    """As the program counts them (5): the ideal ranking of nDCG has as many items as there are hits."""
    values: dict[str, list[float]] = {"recall": [], "ndcg": [], "hitrate": []}
    for start, stop in zip(ranked.offsets[:-1], ranked.offsets[1:], strict=True):
        places = np.sort(ranked.rank[start:stop])
        places = places[places < k]
        ideal = (1 / np.log2(np.arange(len(places)) + 2)).sum()
        values["recall"].append(len(places) / (stop - start))
        values["ndcg"].append(float((1 / np.log2(places + 2)).sum() / ideal) if len(places) else 0.0)
        values["hitrate"].append(float(len(places) > 0))
    return {name: float(np.mean(of_users)) for name, of_users in values.items()}
