from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from distrec.cli import main
from distrec.data import synth
from distrec.data.check import check
from distrec.data.dataset import Dataset
from distrec.data.manifest import SPLITS
from distrec.data.synth import FEWEST, GraphSize, degrees, write_graph
from distrec.errors import BAD_INPUT, InputError

SIZE = GraphSize(users=900, items=400, edges=12_000, dim=16, image_dim=24, seed=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("synth") / "graph"
    write_graph(str(out), SIZE)
    return out


def fingerprint(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_it_passes_check_and_has_the_size_asked_for(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check(str(folder))
    assert "warning" not in capsys.readouterr().out
    data = Dataset.open(str(folder))
    assert (data.users, data.items, sum(data.manifest.interactions.values())) == (900, 400, 12_000)
    assert {name: (entry.width, entry.dtype) for name, entry in data.manifest.features.items()} == {
        "text": (16, "float16"),
        "image": (24, "float16"),
    }
    for split in SPLITS:  # each user has at least one interaction in each split
        assert len(np.unique(data.interactions(split).user)) == 900


@pytest.mark.parametrize("block", [1, 777, 10**9])
def test_the_bytes_do_not_depend_on_the_blocks(
    folder: Path, tmp_path: Path, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if block == 777:
        monkeypatch.setattr(synth, "_BLOCK", 64)
    write_graph(str(tmp_path / "graph"), SIZE, block)
    assert fingerprint(tmp_path / "graph") == fingerprint(folder)


def test_parts_hold_the_same_rows_as_one(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distrec.data.parts.ROWS_PER_PART", 1000)
    monkeypatch.setattr("distrec.data.parts.ITEMS_PER_PART", 64)
    write_graph(str(tmp_path / "graph"), SIZE, 300)
    parts, whole = Dataset.open(str(tmp_path / "graph")), Dataset.open(str(folder))
    assert len(parts.manifest.features["text"].parts) == 7
    assert sum(name.startswith("interactions/train") for name in parts.manifest.files) > 5
    assert all(
        entry.rows == 1000 for name, entry in parts.manifest.files.items() if name.endswith("train/part-00000.parquet")
    )
    check(str(tmp_path / "graph"))
    for split in SPLITS:
        for column in ("user", "item", "timestamp"):
            assert np.array_equal(
                getattr(parts.interactions(split), column), getattr(whole.interactions(split), column)
            )
    assert np.array_equal(parts.feature_rows("image", 0, 400)[0], whole.feature_rows("image", 0, 400)[0])


def test_another_seed_is_another_graph(folder: Path, tmp_path: Path) -> None:
    write_graph(str(tmp_path / "graph"), GraphSize(900, 400, 12_000, 16, 24, seed=4))
    ours, theirs = fingerprint(tmp_path / "graph"), fingerprint(folder)
    assert {name for name in ours if ours[name] == theirs[name]} == {"users.parquet", "items.parquet"}


def test_degrees_are_skewed_on_both_sides(folder: Path) -> None:
    data = Dataset.open(str(folder))
    pairs = [data.interactions(split) for split in SPLITS]
    user = np.bincount(np.concatenate([part.user for part in pairs]), minlength=900)
    item = np.bincount(np.concatenate([part.item for part in pairs]), minlength=400)
    assert np.array_equal(user, degrees(SIZE))
    assert user.min() >= FEWEST
    assert user.max() > 5 * np.median(user)
    top = np.sort(item)[::-1]
    assert top[:40].sum() > 0.25 * top.sum()  # a tenth of the items


def test_content_tells_something_about_choices(folder: Path) -> None:
    """A user's training items resemble the user's test items more than they resemble random items."""
    data = Dataset.open(str(folder))
    train, test = data.interactions("train"), data.interactions("test")
    draw = np.random.default_rng(0).permutation(len(test))
    for name in data.manifest.features:
        vectors, _ = data.feature_rows(name, 0, data.items)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        taste = np.zeros((data.users, vectors.shape[1]))
        np.add.at(taste, train.user, vectors[train.item])
        own = (taste[test.user] * vectors[test.item]).sum(1)
        other = (taste[test.user] * vectors[test.item[draw]]).sum(1)  # equally popular items
        assert own.mean() > other.mean() + 4 * (own - other).std() / len(own) ** 0.5


@pytest.mark.parametrize(
    ("users", "items", "edges"), [(50, 12, 150), (7, 40, 70), (1, 100, 25), (30, 60, 90), (200, 1000, 50_000)]
)
def test_extreme_sizes_pass_check(tmp_path: Path, users: int, items: int, edges: int) -> None:
    write_graph(str(tmp_path / "graph"), GraphSize(users, items, edges, dim=1, image_dim=2))
    check(str(tmp_path / "graph"))


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"users": 0}, "option '--users' is 0; give 1 to 2,147,483,647."),
        ({"items": -2}, "option '--items' is -2; give 1 to"),
        ({"edges": 0}, "option '--edges' is 0; give 1 to 1,000,000,000,000."),
        ({"dim": 10**9}, "option '--dim' is 1000000000; give 1 to 65,536."),
        ({"image-dim": 0}, "option '--image-dim' is 0; give 1 to 65,536."),
        ({"items": 2**31}, "option '--items' is 2147483648; give 1 to 2,147,483,647."),
        ({"items": 11}, "option '--items' is 11, which must be at least 12"),
        (
            {"edges": 10_001},
            "option '--edges' is 10001, more than a quarter of the 100 x 400 pairs; lower it to at most",
        ),
        ({"edges": 299}, "option '--edges' is 299, too few for 3 interactions of each of 100 users; raise it to"),
    ],
)
def test_a_bad_size_is_refused_by_option(
    changed: dict[str, int], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"users": 100, "items": 400, "edges": 1000, "dim": 4} | changed
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    assert main(["synth", "graph", *words, "--out", str(tmp_path / "graph")]) == BAD_INPUT
    assert told in capsys.readouterr().err
    assert not (tmp_path / "graph").exists()


def test_an_existing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"option '--out' is .* exists already; remove it or give another folder"):
        write_graph(str(tmp_path), SIZE)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        write_graph(str(tmp_path / "file" / "graph"), SIZE)


def test_the_verb_writes_a_dataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["synth", "graph", "--users", "60", "--items", "50", "--edges", "400", "--dim", "8", "--seed", "3", "--out"]
    assert main([*words, str(tmp_path / "graph")]) == 0
    assert "60 users, 50 items, 400 interactions" in capsys.readouterr().out
    assert Dataset.open(str(tmp_path / "graph")).manifest.config["synth"]["seed"] == 3
