from __future__ import annotations

import csv
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distrec.data import demo
from distrec.data.check import check
from distrec.data.dataset import Dataset
from distrec.data.demo_items import WORDS
from distrec.data.manifest import COLD
from distrec.data.prepare import prepare
from distrec.evaluation.metrics import means, per_user

SEED = 7
CONFIG = str(Path(__file__).parents[2] / "configs/data/demo.yaml")


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "raw"
    demo.write_demo(str(out), SEED)
    return out


@pytest.fixture(scope="module")
def data(shop: Path) -> Dataset:
    return prepare(CONFIG, str(shop), str(shop.parent / "prepared"))


def rows(file: Path) -> list[dict[str, str]]:
    with open(file, newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def fingerprint(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def matrix(data: Dataset, split: str) -> np.ndarray:
    pairs = data.interactions(split)
    found = np.zeros((data.users, data.items), bool)
    found[pairs.user, pairs.item] = True
    return found


def test_the_same_seed_gives_the_same_bytes_in_another_process(shop: Path, tmp_path: Path) -> None:
    code = "import sys; from distrec.data.demo import write_demo; write_demo(sys.argv[1], int(sys.argv[2]))"
    environment = {**os.environ, "PYTHONHASHSEED": "123"}
    for name, seed in (("same", SEED), ("other", SEED + 1)):
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / name), str(seed)], env=environment, check=True, timeout=120
        )
    wanted = fingerprint(shop)
    assert fingerprint(tmp_path / "same") == wanted
    other = fingerprint(tmp_path / "other")
    assert all(
        other[name] != wanted[name] for name in ("interactions.csv", "items.csv", "oracle.json", "images/i0000.jpg")
    )


def test_counts_and_missing_content(data: Dataset, shop: Path) -> None:
    assert (data.users, data.items) == (2000, 1000)
    assert sum(data.manifest.interactions.values()) == 40_000
    assert min(data.manifest.interactions.values()) > 3000
    assert data.manifest.content == {"text": 940, "image": 960}
    check(str(data.folder))
    items = rows(shop / "items.csv")
    named = {row["image"] for row in items if row["image"]}
    assert named == {path.name for path in (shop / "images").iterdir()}
    sizes = {Image.open(shop / "images" / name).size for name in sorted(named)[:50]}
    assert sizes == {(96, 96)}
    texts = [row["description"] for row in items if row["description"]]
    assert len(set(texts)) == len(texts)


def test_splits_follow_one_another_and_new_items_come_late(data: Dataset) -> None:
    train, valid, test = (data.interactions(name) for name in ("train", "valid", "test"))
    assert train.timestamp.max() < valid.timestamp.min()
    assert valid.timestamp.max() < test.timestamp.min()
    seen = np.bincount(train.item, minlength=data.items)
    cold = seen <= COLD
    assert 100 < cold.sum() < 250
    assert (seen == 0).sum() > 30
    share = cold[test.item].mean()
    assert 0.05 < share < 0.3
    few = (seen > 0) & cold
    first = np.full(data.items, np.inf)
    np.minimum.at(first, train.item, train.timestamp)
    assert np.median(first[few]) > np.quantile(train.timestamp, 0.6)


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_a_users_items_agree_in_their_attributes_more_than_random_items(data: Dataset, split: str) -> None:
    pairs = data.interactions(split)  # type: ignore[arg-type]
    values = np.stack(list(demo.attributes(SEED).values()))
    same_user = pairs.user[1:] == pairs.user[:-1]
    left, right = pairs.item[1:][same_user], pairs.item[:-1][same_user]
    agreement = (values[:, left] == values[:, right]).mean(1)
    chance = [
        np.bincount(row[left], minlength=9) @ np.bincount(row[right], minlength=9) / len(left) ** 2 for row in values
    ]
    assert (agreement > 1.2 * np.array(chance)).all()


@pytest.mark.parametrize("split", ["valid", "test"])
def test_the_published_oracle_is_that_of_the_prepared_split(data: Dataset, shop: Path, split: str) -> None:
    published = json.loads((shop / "oracle.json").read_text())[split]
    utility = demo.utilities(SEED)
    chance = np.exp(utility) / np.exp(utility).sum(1, keepdims=True)
    train, held = matrix(data, "train"), matrix(data, split)
    cold = train.sum(0) <= COLD
    scores = {"oracle": chance, "popularity": np.tile(chance.mean(0), (data.users, 1))}
    for name, score in scores.items():
        rank = np.argsort(np.argsort(np.where(train, np.inf, -score), axis=1, kind="stable"), axis=1)
        for suffix, kept in (("", held), ("_cold", held & cold)):
            user, item = np.nonzero(kept)
            offsets = np.concatenate([[0], np.flatnonzero(np.diff(user)) + 1, [len(user)]])
            found = means(per_user(rank[user, item], offsets, demo.KS))
            for key, value in published[name + suffix].items():
                assert value == pytest.approx(found[key], abs=2e-6), (name + suffix, key)


def test_tastes_are_worth_much_more_than_popularity_also_for_cold_items(shop: Path) -> None:
    report = json.loads((shop / "oracle.json").read_text())
    for split in ("valid", "test"):
        metrics = report[split]
        assert metrics["oracle"]["recall@20"] > 4 * metrics["popularity"]["recall@20"]
        assert metrics["oracle_cold"]["recall@20"] > 4 * metrics["popularity_cold"]["recall@20"]
        assert metrics["oracle"]["recall@20"] < 0.6  # far from a trivial task


def test_descriptions_do_not_give_all_away(shop: Path) -> None:
    """Each attribute is named in some descriptions and omitted from others; no description names all five."""
    values = demo.attributes(SEED)
    texts = [row["description"].lower() for row in rows(shop / "items.csv")]
    said = {
        name: np.array(
            [
                any(word in text for word in words[demo.VALUES[name][values[name][item]]])
                for item, text in enumerate(texts)
            ]
        )[[bool(text) for text in texts]]
        for name, words in WORDS.items()
    }
    for name, mask in said.items():
        assert 0.25 < mask.mean() < 0.99, name
    assert np.stack(list(said.values())).all(0).mean() < 0.2
