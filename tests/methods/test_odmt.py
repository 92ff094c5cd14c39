"""ODMT: the properties of its settings (10). `test_every_method.py` compares it with its plain transcription.

Section numbers in brackets refer to docs/methods/odmt.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distrec.cli import main
from distrec.data.dataset import Dataset, Interactions
from distrec.data.histories import Histories
from distrec.data.sampling import Windows
from distrec.errors import InputError
from distrec.methods.batch import Step, batch_of
from distrec.methods.odmt import distillation_weight
from distrec.parallel.partition import share
from distrec.parallel.world import World
from distrec.runtime import quiet
from tests.distributed import run_workers
from tests.methods.bare import SEED, Bare, method_of
from tests.methods.plain_odmt import plain_of
from tests.training import small
from tests.training.random_data import write_random

ODMT: dict[str, Any] = {"name": "odmt", "dim": 8, "id_dim": 6, "length": 5, "dropout": 0.0, "alpha": 4}
LOCAL = {
    "local": ODMT | {"negatives": "local"},
    "local, a column per slot": ODMT | {"negatives": "local", "dedupe": False},
}
DATASETS = {"more users": (30, 14, 102, 0), "more items": (9, 40, 52, 1)}
BATCH, EPOCH = 50, 2


def worker(folder: str, cases: dict[str, dict[str, Any]]) -> dict[tuple[str, str], Any]:
    """For each dataset and case: terms summed over ranks, the batch's windows, weights and settings."""
    quiet()
    out: dict[tuple[str, str], Any] = {}
    for dataset in DATASETS:
        for case, settings in cases.items():
            bare = Bare(World.current(), Dataset.open(str(Path(folder, dataset))), settings)
            batch = bare.batch(BATCH, EPOCH)
            terms = {name: term.detach().clone() for name, term in bare.method.loss(batch).items()}
            total = {name: float(bare.world.sum_(term)) for name, term in terms.items()}
            weights = {name: bare.whole(table, bare.items).double() for name, table in bare.tables.items()}
            weights |= {name: x.detach().double() for name, x in bare.dense.items()}
            out[dataset, case] = total, batch.windows, weights, bare.method.config.model_dump()
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data")
    for name, shape in DATASETS.items():
        write_random(path / name, *shape)
    return path


@pytest.mark.multiprocess
@pytest.mark.parametrize("size", [2, 3])
def test_local_negatives_are_the_mean_of_that_many_processes(folder: Path, size: int):
    for (dataset, case), (total, windows, weights, config) in run_workers(worker, size, str(folder), LOCAL)[0].items():
        plain = plain_of(Dataset.open(str(folder / dataset)), config)
        shares = [windows[slice(*share(len(windows), rank, size))] for rank in range(size)]
        alone = [plain.terms(weights, part, EPOCH + 1) for part in shares]
        means = {name: float(np.mean([float(terms[name]) for terms in alone])) for name in total}
        assert total == pytest.approx(means, rel=2e-6), (dataset, case)
        whole = plain.terms(weights, windows, EPOCH + 1)
        assert total["ce_id"] != pytest.approx(float(whole["ce_id"]), rel=1e-2)


def test_one_worker_has_no_local_negatives_of_its_own(folder: Path):
    found = worker(str(folder), {kind: ODMT | {"negatives": kind} for kind in ("global", "local")})
    for dataset in DATASETS:
        assert found[dataset, "global"][0] == pytest.approx(found[dataset, "local"][0], rel=1e-7)


def made(folder: Path, **settings: Any) -> Bare:
    return Bare(World(0, 1), Dataset.open(str(folder / "more items")), ODMT | settings)


@pytest.mark.parametrize(("version", "sees"), [("v1", False), ("v3", True)])
def test_only_v3_lets_texts_and_images_see_the_id(folder: Path, version: str, sees: bool):
    bare = made(folder, version=version)
    before = bare.final().items.clone()
    with torch.no_grad():
        bare.tables["item"].normal_(generator=torch.Generator().manual_seed(1))
    after = bare.final().items
    changed = {name: bool((before[:, part] != after[:, part]).any()) for name, part in bare.method.branches().items()}
    assert changed == {"id": True, "text": sees, "image": sees}


@pytest.mark.parametrize("dedupe", [True, False])
def test_identical_users_leave_nothing_to_tell_the_label_from(folder: Path, dedupe: bool):
    bare = made(folder, dedupe=dedupe)
    windows = np.tile([[-1, -1, 3, 0, 5, 1]], (4, 1))
    batch = batch_of(
        bare.world, bare.users, bare.items, Windows(np.arange(4), windows, np.arange(4)), Step(SEED, 0, 0, 4, 4)
    )
    terms = bare.method.loss(batch)
    assert [float(terms[f"ce_{name}"].detach()) for name in bare.method.branches()] == pytest.approx([0] * 3, abs=1e-6)
    assert float(terms["kd"].detach()) == pytest.approx(0, abs=1e-6)


def test_many_rows_are_cut_into_blocks_without_a_change(folder: Path, monkeypatch: pytest.MonkeyPatch):
    bare = made(folder)
    whole = bare.gradients(sum(bare.method.loss(bare.batch(BATCH)).values()))
    monkeypatch.setattr("distrec.methods.distillation._BLOCK_ELEMENTS", 50)  # about two rows of scores
    cut = bare.gradients(sum(bare.method.loss(bare.batch(BATCH)).values()))
    for name, grad in whole.items():
        torch.testing.assert_close(cut[name], grad, rtol=1e-4, atol=1e-6)


def test_with_dropout_a_slot_has_its_own_draw_only_without_dedupe(folder: Path):
    for dedupe in (True, False):
        bare = made(folder, dedupe=dedupe, dropout=0.5)
        windows = np.array([[0, 1, 2, 0, 3, 4], [5, 0, 1, 6, 2, 7]])
        samples = Windows(np.arange(2), windows, np.arange(2))
        batch = batch_of(bare.world, bare.users, bare.items, samples, Step(SEED, 0, 0, 2, 2))
        read = bare.method.read(batch)
        vectors = read.columns[read.column]
        assert bool((vectors[0, 0] == vectors[0, 3]).all()) == dedupe == (len(read.columns) == 8)


@pytest.mark.parametrize(
    ("alpha", "epoch", "weight"),
    [(60, 30, np.exp(-1.25)), (50, 40, 0.8187), (20, 20, 1), (20, 31, 1), (1, 1, 1), (0.25, 7, 0.25), (0, 3, 0)],
)
def test_distillation_grows_over_its_epochs(alpha: float, epoch: int, weight: float):
    assert distillation_weight(alpha, epoch) == pytest.approx(weight, abs=1e-4)


def test_ranking_means_the_newest_position_and_users_without_a_history_score_zero(folder: Path):
    bare = made(folder)
    final, config = bare.final(), bare.method.config.model_dump()
    plain = plain_of(bare.method.data, config)
    weights = {name: x.detach().double() for name, x in (bare.tables | bare.dense).items()}
    vectors = plain.items(weights, torch.arange(bare.items.total))
    windows = torch.from_numpy(Histories([bare.train], bare.users.total).newest(np.arange(bare.users.total), 5))
    scores = torch.zeros(bare.users.total, bare.items.total, dtype=torch.float64)
    for name, e in zip(("id", "text", "image"), vectors, strict=True):
        scores += plain.users(weights, name, e[windows], windows >= 0)[:, -1] @ e.t() / 3
    torch.testing.assert_close(bare.method.score(final.users, final.items).double(), scores, rtol=1e-4, atol=1e-5)
    none = Interactions(*(np.empty(0, kind) for kind in (np.int32, np.int32, np.int64)))
    with torch.no_grad():
        strangers = bare.method.representations(Histories([none], bare.users.total))
    assert not strangers.users.any()
    assert strangers.items.equal(final.items)


@pytest.mark.parametrize("init", [1, 2, 3])
def test_the_id_table_starts_from_first_tokens(folder: Path, init: int):
    bare = made(folder, init=init)
    text, image = (bare.method.data.token_rows(f"{name}-tokens", 0, 40)[0][:, 0] for name in ("text", "image"))
    wanted = {1: (text.astype(np.float32) + image.astype(np.float32)) / 2, 2: image, 3: text}[init]
    np.testing.assert_allclose(bare.tables["item"].detach().numpy(), wanted, rtol=1e-6)


def test_it_says_which_items_lack_a_modality(folder: Path):
    data = Dataset.open(str(folder / "more items"))
    lacking = {name: data.feature(name).missing for name in ("text-tokens", "image-tokens")}
    assert all(lacking.values())
    assert method_of(data, **ODMT).degradations() == [
        f"{count} of 40 items lack '{name}'; a zero vector is used as their only token"
        for name, count in lacking.items()
    ]


def test_it_says_where_copies_share_dropout_and_where_the_number_of_workers_matters(folder: Path):
    data = Dataset.open(str(folder / "more items"))

    def told(**settings: Any) -> str:
        return " ".join(method_of(data, **(ODMT | settings)).degradations())

    assert "share their dropout" in told(dropout=0.1)
    assert "share their dropout" not in told(dropout=0.1, dedupe=False)
    assert "number of workers" in told(negatives="local")
    assert "number of workers" not in told()


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"alpha": -1}, "key 'method.alpha' is -1"),
        ({"tau": 0}, "key 'method.tau' is 0"),
        ({"length": 0}, "key 'method.length' is 0"),
        ({"dim": 9}, "key 'method.dim' is 9, which 2 heads ('method.merged_att_layers') do not divide"),
        ({"user_heads": 3}, "key 'method.dim' is 8, which 3 heads ('method.user_heads') do not divide"),
        ({"id_dim": 4, "init": 3}, "key 'method.init' is 3, which starts the ID table from 'text-tokens', 8 wide"),
        ({"init": 2}, "from 'image-tokens', 5 wide, but 'method.id_dim' is 8; set it to 5, or 'method.init' to 0"),
        ({"init": 1}, "but 'text-tokens' is 8 wide and 'image-tokens' 5; use 'method.init' 0, 2 or 3"),
        ({"init": 4}, "key 'method.init' is 4"),
        ({"init": 0, "tie_cls_feature": True}, "key 'method.tie_cls_feature' is true, but with 'method.init' 0"),
        ({"text_tokens": "words"}, "key 'method.text_tokens' is 'words', which is not in the dataset"),
        ({"image_tokens": "image"}, "key 'method.image_tokens' is 'image', which has one vector per item"),
        ({"image_tokens": "image"}, "--tokens' and name a set it writes"),
    ],
)
def test_wrong_settings_are_refused_in_words(tmp_path: Path, settings: dict[str, Any], told: str):
    data = Dataset.open(small.write_small(tmp_path))
    with pytest.raises(InputError) as error:
        method_of(data, **(ODMT | {"id_dim": 8, "init": 3} | settings))
    assert told in str(error.value)


def test_evaluation_tells_each_branch_beside_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    data = small.write_small(tmp_path / "data")
    assert main(["train", small.write_config(tmp_path / "run.yaml", data, tmp_path, "odmt", train={"epochs": 1})]) == 0
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows[-4:]] == ["fused", "id", "text", "image"]
    found = small.read(tmp_path / "run/evaluation", "test.json")
    alone = [found["branches"][name]["metrics"] for name in ("id", "text", "image")]
    assert all(metrics.keys() == found["metrics"].keys() for metrics in alone)
    assert all(metrics != found["metrics"] for metrics in alone)
