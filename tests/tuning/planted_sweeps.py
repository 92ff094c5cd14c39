"""Sweep folders with invented but consistent numbers, and the small dataset that they refer to."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import yaml
from PIL import Image, ImageDraw

from distrec.config import RunConfig, decode
from distrec.data.dataset import Dataset, write_part
from distrec.data.manifest import FORMAT, Manifest, write_manifest
from distrec.data.parquet import parquet_bytes
from distrec.data.storage import Folder, open_folder
from distrec.methods.registry import resolve

USERS, ITEMS = 200, 60
METRICS = ("recall@10", "ndcg@10", "hit@10", "recall@20", "ndcg@20", "hit@20")
VERSIONS = {"python": "3.11.7", "distrec": "0.1.0", "torch": "2.13.0+cpu"}
NOTE = "no CUDA device is used: tensors and exchanges run on the CPU over gloo"
SLICES = {
    "items.cold": ("items with at most 5 training interactions", 80, 0.2),
    "items.warm": ("items with more than 5 training interactions", 180, 1.1),
    "items.without.image": ("items without image", 25, 0.7),
    "users.1-5": ("users with 1-5 training interactions", 60, 0.8),
    "users.6-10": ("users with 6-10 training interactions", 140, 1.1),
}


@dataclass(frozen=True)
class Planted:
    """One method of a planted sweep."""

    label: str
    title: str
    method: str
    reads_content: bool
    quality: float  # the approximate value of its metric
    space: dict[str, list[Any]] = field(default_factory=dict)
    epochs: int = 12
    statuses: tuple[str, ...] = ("done",)  # the statuses of the trials, repeated
    seconds: float = 600.0


LR = [0.0001, 0.0007, 0.0012, 0.004, 0.009, 0.02]
NINE = (
    Planted("alignrec", "AlignRec", "alignrec", True, 0.113,
            {"optimizer.lr": LR, "method.user_item_layers": [1, 2, 3], "method.dim": [32, 64]}, 40,
            ("done", "done", "stopped")),
    Planted("odmt", "ODMT", "odmt", True, 0.118,
            {"optimizer.lr": LR, "method.tau": [0.3, 0.4, 0.5], "method.alpha": [0, 20, 40, 50, 60]}, 60,
            ("stopped", "done"), 4000),
    Planted("mentor", "MENTOR (published)", "mentor", True, 0.111, {"optimizer.lr": LR, "method.dim": [32, 64]}, 30,
            ("done", "failed", "done"), 2500),
    Planted("stair", "STAIR", "stair", True, 0.115,
            {"optimizer.lr": LR, "method.gamma": [0.05, 0.1, 0.31, 0.4, 0.6, 0.9]}, 90),
    Planted("bivrec", "BiVRec (reconstruction)", "bivrec", True, 0.106,
            {"optimizer.lr": LR, "method.dim": [32, 64]}, 20, ("done", "stopped"), 5000),
    Planted("lightgcn", "LightGCN", "lightgcn", False, 0.109, {"optimizer.lr": LR, "method.layers": [1, 2, 3, 4]}, 120),
    Planted("sasrec", "SASRec", "sasrec", False, 0.104, {"optimizer.lr": LR}, 50),
    Planted("bprmf", "BPR-MF", "bprmf", False, 0.097, {"optimizer.lr": LR}, 80),
    Planted("popularity", "popularity", "popularity", False, 0.063, {}, 0, seconds=9),
)  # fmt: skip
TWO = (
    Planted("odmt", "ODMT", "odmt", True, 0.12, {"optimizer.lr": LR, "method.alpha": [0, 20]}),
    Planted("lightgcn", "LightGCN", "lightgcn", False, 0.10, {"optimizer.lr": LR, "method.layers": [1, 2, 3]}),
)


def plant_data(path: str, pictures: bool = True) -> str:
    """Write a prepared dataset of `USERS` users and `ITEMS` items with titles, and pictures for nine items of ten."""
    folder, rng = open_folder(path), np.random.default_rng(0)
    pairs = np.stack([np.repeat(np.arange(USERS), 3), rng.integers(0, ITEMS, 3 * USERS)]).astype(np.int32)
    files = {}
    for place, split in enumerate(("train", "valid", "test")):
        user, item = pairs[:, place::3]
        table = pa.table({"user": user, "item": item, "timestamp": np.zeros(len(user), np.int64)})
        name = f"interactions/{split}/part-00000.parquet"
        files[name] = write_part(folder, name, table)
    index = np.arange(ITEMS, dtype=np.int32)
    titles = [f"{'A rather long title of' if n % 3 else 'Thing'} <b>& {n}</b>" for n in range(ITEMS)]
    users = {"index": np.arange(USERS, dtype=np.int32), "original": [f"u{n}" for n in range(USERS)]}
    files["users.parquet"] = write_part(folder, "users.parquet", pa.table(users))
    items = {"index": index, "original": [f"i{n}" for n in range(ITEMS)], "title": titles}
    files["items.parquet"] = write_part(folder, "items.parquet", pa.table(items))
    images = [picture(n) if pictures and n % 10 else None for n in range(ITEMS)]
    for part, at in enumerate((index[:25], index[25:])):  # several parts and row groups
        columns = {"item": at, "text": [titles[n] for n in at], "image": pa.array([images[n] for n in at], pa.binary())}
        name = f"content/part-{part:05d}.parquet"
        files[name] = write_part(folder, name, pa.table(columns), 10)
    content = {"text": ITEMS, "image": sum(image is not None for image in images)}
    manifest = Manifest(
        format=FORMAT, name="planted", users=USERS, items=ITEMS, split="leave_last_out", id_order="sorted",
        content=content, interactions=dict.fromkeys(("train", "valid", "test"), USERS), features={}, config={},
        files=files,
    )  # fmt: skip
    write_manifest(folder, manifest)
    return path


def picture(number: int) -> bytes:
    """A PNG image that is different for each item."""
    image = Image.new("RGB", (150, 200), ((number * 37) % 256, (number * 91) % 256, (number * 53) % 256))
    ImageDraw.Draw(image).ellipse((20, 30, 130, 170), fill=((number * 91) % 256, 200, (number * 17) % 256))
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def plant(
    path: str,
    data: str,
    entries: Sequence[Planted] = TWO,
    trials: int = 6,
    seeds: int = 3,
    state: str = "done",
    published: Sequence[dict[str, Any]] = (),
) -> Folder:
    """Write a sweep folder; `state` is "searching", "finishing" (every second entry has seeds) or "done"."""
    folder = open_folder(path)
    closed = state != "searching"
    settings = {
        "run": {"name": folder.path.rsplit("/", 1)[-1], "storage": folder.path.rsplit("/", 1)[0]},
        "data": data, "metric": "recall@20", "searcher": "random", "scheduler": "asha", "seed": 1, "seeds": seeds,
        "budget": {"trials": trials, "hours": 2.0, "epochs": 120, "min_trials": 1},
        "resources": {"workers": 0, "cpus_per_worker": 1.0, "threads": 1},
        "evaluate": {"mask": "train", "ks": [10, 20]},
        "methods": {entry.label: {"space": entry.space} for entry in entries},
    }  # fmt: skip
    folder.write_bytes(yaml.safe_dump(settings).encode(), "sweep.yaml")
    winners = {}
    for place, entry in enumerate(entries):
        values = [_trial(folder, data, entry, number) for number in range(trials)]
        finished = [number for number, value in enumerate(values) if value is not None]
        if not closed or not finished:
            continue
        best = max(finished, key=lambda number: values[number] or 0.0)
        winners[entry.label] = f"{entry.label}-{best:03d}"
        config = run_config(entry, data, best, f"{entry.label}-again", folder.path)
        folder.write_bytes(config, "winners", f"{entry.label}.yaml")
        for seed in range(1001, 1001 + seeds) if state == "done" or place % 2 == 0 else ():
            _final(folder, data, entry, best, seed, place)
    dataset = Dataset.open(data)
    folder.write_json(
        {
            "identity": {}, "attempts": [{"started": "2026-11-21T10:00:00Z"}], "seconds": 5400.0, "cpus": 4,
            "closed": "2026-11-21T11:30:00Z" if closed else None,
            "done": "2026-11-21T12:00:00Z" if state == "done" else None,
            "data": {"name": "planted", "users": USERS, "items": ITEMS, "split": "leave_last_out", "hash": dataset.hash,
                     "interactions": dataset.manifest.interactions},
            "entries": {
                e.label: {"title": e.title, "method": e.method, "reads_content": e.reads_content} for e in entries
            },
            "versions": VERSIONS, "published": list(published), "winners": winners,
        },
        "sweep.json",
    )  # fmt: skip
    return folder


def run_config(entry: Planted, data: str, number: int, name: str, storage: str) -> bytes:
    """The resolved run config of a trial."""
    tree: dict[str, Any] = {"data": data, "run": {"name": name, "storage": storage}, "method": {"name": entry.method}}
    for key, value in values_of(entry, number).items():
        section, _, leaf = key.partition(".")
        tree.setdefault(section, {})[leaf] = value
    return yaml.safe_dump(resolve(decode(RunConfig, tree)).model_dump(), sort_keys=False).encode()


def values_of(entry: Planted, number: int) -> dict[str, Any]:
    """Parameters of a trial."""
    return {
        key: values[(number + place * (number // 2 + 1)) % len(values)]
        for place, (key, values) in enumerate(entry.space.items())
    }


def write_trial(folder: Folder, kind: str, name: str, record: dict[str, Any], epochs: list[dict[str, Any]]) -> None:
    """Write the files that a trial and a final run have in common."""
    folder.write_json(record, kind, name, "trial.json")
    started = f"2026-11-21T10:{record.get('number', 0):02d}:00Z"
    folder.write_json(
        {"attempts": [{"started": started}], "versions": VERSIONS, "degradations": [NOTE]}, kind, name, "run.json"
    )
    folder.write_bytes("".join(json.dumps(epoch) + "\n" for epoch in epochs).encode(), kind, name, "metrics.jsonl")


def _epochs(entry: Planted, count: int, top: float, seed: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    out = []
    for epoch in range(1, count + 1):
        level = top * (1 - np.exp(-4 * epoch / max(entry.epochs, 1))) + rng.normal() * 0.001
        record: dict[str, Any] = {
            "epoch": epoch,
            "loss": {"bpr": 0.7 / epoch},
            "seconds": {"train": entry.seconds / 100 + epoch * 0.01, "evaluate": 0.1},
        }
        if epoch % 2 == 0 or epoch == count:
            record["valid"] = {metric: float(level) * (0.6 if "ndcg" in metric else 1.0) for metric in METRICS}
        record["peak_memory_bytes"] = int(entry.seconds * 1e6) + 2**28 + epoch
        out.append(record)
    return out


def _trial(folder: Folder, data: str, entry: Planted, number: int) -> float | None:
    """Write a trial and return its value."""
    name, status = f"{entry.label}-{number:03d}", entry.statuses[number % len(entry.statuses)]
    top = entry.quality * (1.15 - 0.06 * abs(number - 3))
    count = {"done": entry.epochs, "stopped": max(entry.epochs // 3, 1), "failed": 1, "running": 3, "waiting": 0}[
        status
    ]
    epochs = _epochs(entry, min(count, entry.epochs), top, number)
    record = {
        "id": name, "entry": entry.label, "number": number, "values": values_of(entry, number), "status": status,
        "reason": {"failed": "loss 'bpr' is NaN at step 7", "stopped": "asha at epoch 4"}.get(status),
        "failures": int(number == 2), "seconds": entry.seconds * (1 + number / 10), "cpus": 2.0,
    }  # fmt: skip
    write_trial(folder, "trials", name, record, epochs)
    if status == "done" and not entry.epochs:
        folder.write_json(
            {"valid": dict.fromkeys(METRICS, entry.quality), "best_epoch": None}, "trials", name, "summary.json"
        )
        return entry.quality
    measured = [epoch["valid"]["recall@20"] for epoch in epochs if "valid" in epoch]
    return max(measured) if measured and status in ("done", "stopped") else None


def _ending(entry: Planted, early: bool) -> dict[str, Any]:
    """How training ended: two epochs after the best one, or at it."""
    if not entry.epochs:
        return {"best_epoch": None, "epochs": 0, "end": None, "best_is_last": False, "evaluations_since_best": 0}
    return {
        "best_epoch": entry.epochs - 2 * early, "epochs": entry.epochs, "end": "patience" if early else "epochs",
        "best_is_last": not early, "evaluations_since_best": 2 * early,
    }  # fmt: skip


def _final(folder: Folder, data: str, entry: Planted, number: int, seed: int, place: int) -> None:
    name = f"{entry.label}-seed{seed}"
    rng, taste = np.random.default_rng(seed * 100 + place), np.random.default_rng(5)
    users = np.arange(0, USERS, 2)
    likes = taste.gamma(2.0, 0.5, len(users))
    noise = 0.03 if entry.epochs else 0.0
    columns = {
        metric: np.clip(
            entry.quality * likes * (0.6 if "ndcg" in metric else 1.0) + noise * rng.normal(size=len(users)), 0, 1
        )
        for metric in METRICS
    }
    test = {metric: float(values.mean()) for metric, values in columns.items()}
    record = {
        "id": name, "entry": entry.label, "number": number, "seed": seed, "values": values_of(entry, number),
        "status": "done", "reason": None, "failures": 0, "seconds": entry.seconds * 1.4, "cpus": 2.0,
    }  # fmt: skip
    epochs = _epochs(entry, entry.epochs, entry.quality, seed)
    write_trial(folder, "final", name, record, epochs)
    folder.write_bytes(run_config(entry, data, number, name, f"{folder.path}/final"), "final", name, "config.yaml")
    valid = {metric: entry.quality * 1.1 + noise * 0.02 * float(rng.normal()) for metric in METRICS}
    summary = {
        **_ending(entry, place % 3 > 0),
        "mask": "train",
        "users": {"valid": USERS, "test": len(users)},
        "seconds_per_epoch": entry.seconds / 100,
        "valid": valid,
        "test": test,
    }
    folder.write_json(summary, "final", name, "summary.json")
    slices = {
        part: {
            "meaning": meaning,
            "users": count,
            "pairs": count,
            "metrics": {m: v * factor for m, v in test.items()},
            "intervals": {},
        }
        for part, (meaning, count, factor) in SLICES.items()
    }
    slices["items.unseen"] = {
        "meaning": "items without training interactions",
        "users": 0,
        "pairs": 0,
        "metrics": {},
        "intervals": {},
    }
    folder.write_json({"split": "test", "metrics": test, "slices": slices}, "final", name, "evaluation", "test.json")
    folder.write_bytes(
        parquet_bytes(pa.table({"user": users, **columns})), "final", name, "evaluation", "test-users.parquet"
    )
    titles = dict(enumerate(Dataset.open(data).items_table()["title"].to_pylist()))

    def named(items: Iterable[int]) -> list[dict[str, Any]]:
        return [{"item": item % ITEMS, "id": f"i{item % ITEMS}", "title": titles[item % ITEMS]} for item in items]

    shown = [
        {"user": user, "id": f"u{user}", "history": named(user + step for step in range(12)),
         "held_out": named([user + 15]), "recommended": named(user + 11 + place + 2 * step for step in range(10))}
        for user in (0, 14, 52, 98, 120)
    ]  # fmt: skip
    folder.write_json({"users": shown}, "final", name, "evaluation", "test-examples.json")
