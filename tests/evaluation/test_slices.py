import json

import numpy as np
import pytest

from distrec.data.dataset import Dataset, vector_table, write_part
from distrec.data.manifest import FeatureEntry, Manifest, write_manifest
from distrec.data.storage import open_folder
from distrec.data.synth import write_ids
from distrec.evaluation.report import about, ranking_words, report, table
from distrec.evaluation.slices import missing_items, slices
from tests.evaluation.cases import evaluate, pairs, plain_metrics, plain_rankings, random_case

USERS, ITEMS = 120, 80
SUMMARY = {
    "run": "drawn", "method": "m", "best_epoch": 3, "epochs": 3, "end": "epochs", "best_is_last": True,
    "evaluations_since_best": 0,
}  # fmt: skip


@pytest.fixture(params=range(3))
def sliced(request):
    """A case with its rankings, training counts, missing items and slices by name."""
    case = random_case(request.param, USERS, ITEMS, 300, 200, "ties")
    draw = np.random.default_rng(request.param)
    item = (ITEMS * draw.random(700) ** 2).astype(int)
    train = pairs((USERS * draw.random(700) ** 2).astype(int), item[item % 9 > 0])
    train = pairs(train.user[: len(train.item)], train.item)
    missing = {"text": draw.random(ITEMS) < 0.2, "image": draw.random(ITEMS) < 0.4}
    whole = evaluate(case)
    parts = {part.name: part for part in slices(whole, train, USERS, ITEMS, missing)}
    return case, whole, train, missing, parts


def test_item_slices_keep_targets_and_rank_among_all_items(sliced):
    case, _, train, missing, parts = sliced
    seen = np.bincount(train.item, minlength=ITEMS)
    chosen = {
        "items.cold": seen <= 5,
        "items.unseen": seen == 0,
        "items.warm": seen > 5,
        "items.without.text": missing["text"],
        "items.without.image": missing["image"],
        "items.without.any": missing["text"] | missing["image"],
    }
    rankings = plain_rankings(case, case.users @ case.items.T)
    for name, items in chosen.items():
        kept = {user: (order, {i for i in held if items[i]}) for user, (order, held) in rankings.items()}
        kept = {user: pair for user, pair in kept.items() if pair[1]}
        assert kept, name
        assert parts[name].ranked.user.tolist() == list(kept)
        assert parts[name].ranked.metrics() == pytest.approx(plain_metrics(kept), abs=1e-12)


def test_user_slices_cover_every_user_once(sliced):
    case, whole, train, _, parts = sliced
    rankings = plain_rankings(case, case.users @ case.items.T)
    active = np.bincount(train.user, minlength=USERS)
    groups = {"0": (0, 0), "1-5": (1, 5), "6-10": (6, 10), "11-20": (11, 20), "21-50": (21, 50), "51+": (51, 10**9)}
    assert [name for name in parts if name.startswith("users.")] == [f"users.{span}" for span in groups]
    for span, (low, high) in groups.items():
        kept = {user: pair for user, pair in rankings.items() if low <= active[user] <= high}
        ranked = parts[f"users.{span}"].ranked
        assert ranked.user.tolist() == list(kept)
        assert ranked.metrics() == (pytest.approx(plain_metrics(kept), abs=1e-12) if kept else {})
    assert sum(len(parts[f"users.{span}"].ranked.item) for span in groups) == len(whole.item)


def test_report_is_json_and_its_table_has_aligned_columns(sliced):
    _, whole, _, _, parts = sliced
    told = about(whole, SUMMARY, "test", "train+valid")
    result = report(whole, list(parts.values()), told)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert result["metrics"] == whole.metrics()
    assert result["intervals"] == {name: list(pair) for name, pair in whole.intervals().items()}
    for name, part in parts.items():
        shown = result["slices"][name]
        assert shown["users"] == len(part.ranked.user), name
        assert shown["pairs"] == len(part.ranked.item), name
        assert shown["metrics"] == part.ranked.metrics(), name
    assert result["masked_pairs"] == int(whole.masked.sum()) > 0
    assert result["slices"]["users.51+"] == {
        "meaning": "users with 51+ training interactions",
        "users": 0,
        "pairs": 0,
        "metrics": {},
        "intervals": {},
    }
    assert result.items() >= told.items() >= {"mask": "train+valid", "ks": [1, 5, 10, 20], "split": "test"}.items()
    lines = table(result, "runs/drawn").splitlines()
    assert lines[0] == "runs/drawn: m, best epoch 3 of 3: still improving at the last evaluation; raise 'train.epochs'"
    assert lines[1].startswith(
        f"test: {len(whole.user)} users, ranking all items but the user's train and valid items (mask train+valid)"
    )
    assert f"{result['masked_pairs']} held-out pairs are masked" in lines[1]
    blocks = "\n".join(lines[2:]).strip("\n").split("\n\n")
    for block in blocks:
        assert len({len(line) for line in block.splitlines()}) == 1
    assert len(blocks) == 3
    for block, metric in zip(blocks[1:], ("recall", "ndcg")):
        head, first, *rest = block.splitlines()
        assert head.split() == [metric, "by", "slice", "users", "pairs", "@1", "@5", "@10", "@20"]
        assert [f"{whole.metrics()[f'{metric}@{k}']:.4f}" for k in (1, 5, 10, 20)] == first.split()[3::2]
        assert [line.split()[0] for line in rest] == list(parts)


@pytest.mark.parametrize(
    ("mask", "split", "expected"),
    [
        ("none", "test", "all items (mask none)"),
        ("train", "test", "all items but the user's train items (mask train)"),
        ("train+valid", "test", "all items but the user's train and valid items (mask train+valid)"),
        ("train+valid", "valid", "all items but the user's train items (mask train+valid)"),
    ],
)
def test_a_ranking_is_named_with_its_mask(mask: str, split: str, expected: str) -> None:
    assert ranking_words(mask, split) == expected


@pytest.mark.parametrize("branches", [{}, {"id": 0, "text": 1}])
def test_tables_of_different_methods_show_the_same_metrics(sliced, branches):
    """Whatever metric a method is trained by, and whatever predictors it has."""
    _, whole, _, _, parts = sliced
    told = about(whole, SUMMARY, "valid", "none")
    shown = table(report(whole, list(parts.values()), told, dict.fromkeys(branches, whole)), "r")
    heads = [line.split() for line in shown.splitlines() if " by " in line and "@" in line]
    assert [head[0] for head in heads] == ["recall", "ndcg"] * (2 if branches else 1)
    assert {tuple(word for word in head if "@" in word) for head in heads} == {("@1", "@5", "@10", "@20")}


def test_missing_items_come_from_the_feature_files_and_count_a_modality_once(tmp_path):
    folder = open_folder(str(tmp_path))
    draw = np.random.default_rng(0)
    files, features, expected = write_ids(folder, 1, 50), {}, {}
    for name, share in (
        ("text-tokens", 0.5),
        ("text-tokens-cut2", 0.4),
        ("text", 0.3),
        ("image", 0.1),
        ("image-tokens", 0.6),
        ("sound-tokens", 0.2),
        ("whole", 0.0),
    ):
        lacking = draw.random(50) < share
        tokens = 3 if "-tokens" in name else 1
        parts = []
        for number, (start, stop) in enumerate([(0, 20), (20, 50)]):
            part = f"features/{name}/part-{number:05d}.parquet"
            gone = lacking[start:stop]
            count = np.where(gone, 0, tokens).astype(np.int32) if tokens > 1 else None
            rows = vector_table(start, np.zeros((stop - start, 3), np.float16), gone, count)  # width or tokens
            files[part] = write_part(folder, part, rows, row_group_rows=7)
            parts.append(part)
        features[name] = FeatureEntry(
            tokens=tokens, width=3 // tokens, dtype="float16", missing=int(lacking.sum()), source="drawn", parts=parts
        )
        if lacking.any() and name not in ("text-tokens", "text-tokens-cut2", "image-tokens"):
            expected[name.removesuffix("-tokens")] = lacking.tolist()
    manifest = Manifest(
        format=1,
        name="drawn",
        users=1,
        items=50,
        interactions={"train": 0, "valid": 0, "test": 0},
        split="given",
        id_order="given",
        features=features,
        content={},
        config={},
        files=files,
    )
    write_manifest(folder, manifest)
    found = missing_items(Dataset.open(str(tmp_path)))
    assert {name: items.tolist() for name, items in found.items()} == expected
