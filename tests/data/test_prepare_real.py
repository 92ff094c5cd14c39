"""The shipped data configs on the real data that they are for."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from distrec.data.check import check
from distrec.data.histories import backward
from distrec.data.manifest import SPLITS
from distrec.data.prepare import prepare
from tests.data.raw import original_rows, prepared

REAL = {
    "movielens": ("ml-latest-small-mm", 604, 9_742, (49_590, 5_907, 6_205)),
    "movielens-benchmark": ("ml-latest-small-mm", 602, 2_412, (42_922, 5_078, 5_371)),
    "baby": ("amazon-baby-interactions", 19_445, 7_050, (118_551, 20_559, 21_682)),
}
CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "data"


@pytest.mark.parametrize("name", REAL)
def test_shipped_configs_on_the_real_data(tmp_path: Path, shared_data: Path, name: str, capsys) -> None:
    folder, users, items, counts = REAL[name]
    dataset = prepare(str(CONFIGS / f"{name}.yaml"), str(shared_data / folder), str(tmp_path / "out"))
    assert (dataset.users, dataset.items) == (users, items)
    assert tuple(dataset.manifest.interactions.values()) == counts
    capsys.readouterr()
    check(str(tmp_path / "out"))
    report = capsys.readouterr().out
    assert "no defect found" in report
    if name == "movielens":
        table = pq.read_table(shared_data / folder / "items.parquet").to_pylist()
        texts = [text for batch in dataset.content(["text"]) for text in batch["text"].to_pylist()]
        assert texts[0].startswith("Toy Story (1995). Genres: Adventure, Animation, Children, Comedy, Fantasy. Led by")
        assert dataset.manifest.content == {"text": 9_742, "image": 9_329}
        for row, text in zip(table, texts):
            used = row["overview"] is not None and row["overview_title_match"]
            assert text.endswith(row["overview"].strip()) if used else not (row["overview"] and row["overview"] in text)
        images = pq.read_table(shared_data / folder / "posters-00003-of-00008.parquet").slice(0, 5).to_pylist()
        stored = {}
        for batch in dataset.content(["image"]):
            stored.update(zip(batch["item"].to_pylist(), batch["image"].to_pylist()))
        index = {int(value): row for row, value in enumerate(dataset.items_table()["original"].to_pylist())}
        assert all(stored[index[image["movie_id"]]] == image["jpeg"] for image in images)
    if name == "movielens-benchmark":
        assert {k: (v.width, v.dtype, v.missing) for k, v in dataset.manifest.features.items()} == {
            "text": (384, "float16", 0),
            "image": (1_280, "float16", 12),
        }
        raw = np.load(shared_data / folder / "image_feat.npy", mmap_mode="r")
        movie = pq.read_table(shared_data / folder / "items.parquet")["movie_id"].to_numpy()
        wanted = np.searchsorted(movie, np.array(dataset.items_table()["original"].to_pylist(), np.int64))
        values, missing = dataset.feature_rows("image", 0, dataset.items)
        assert np.array_equal(values, raw[wanted].astype(np.float32))
        assert np.array_equal(missing, ~values.any(axis=1))
        assert dataset.items_table()["title"][0].as_py() == "Toy Story (1995)"


@pytest.mark.parametrize("name", ["movielens-benchmark", "baby"])
def test_the_time_rule_gives_the_published_counts_and_split(tmp_path: Path, shared_data: Path, name: str) -> None:
    folder, *_ = REAL[name]
    path, source = str(CONFIGS / f"{name}.yaml"), str(shared_data / folder)
    given = prepare(path, source, str(tmp_path / "given"))
    by_rule = prepare(path, source, str(tmp_path / "rule"), ["split.name=per_user_time"])
    assert by_rule.manifest.interactions == given.manifest.interactions
    order = backward({split: given.interactions(split) for split in SPLITS}, given.users)
    if name == "movielens-benchmark":
        assert original_rows(by_rule) == original_rows(given)
        assert order.older == 0
    else:  # the published Baby split has the same counts, but is not in time order
        assert order.older > 10_000


def test_the_benchmark_filter_is_the_published_one(tmp_path: Path, shared_data: Path) -> None:
    source = tmp_path / "raw"
    source.mkdir()
    shutil.copy(shared_data / "ml-latest-small-mm" / "interactions.parquet", source)
    columns = {"user": "user_id", "item": "movie_id", "rating": "rating", "timestamp": "timestamp"}
    importer = {"interactions": {"files": "interactions.parquet", **columns}}
    dataset = prepared(tmp_path, importer, min_rating=3.5, k_core={"users": 5, "items": 5})
    published = pq.read_table(shared_data / "ml-latest-small-mm" / "benchmark_split.parquet").to_pylist()
    expected = {(str(r["user_id"]), str(r["movie_id"]), r["timestamp"], r["split"]) for r in published}
    assert original_rows(dataset) == expected
