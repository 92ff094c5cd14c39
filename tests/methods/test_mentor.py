"""MENTOR: which weights each loss term trains, which layers are left out, the keys of the noise, and stale scores.

Section numbers in brackets refer to docs/methods/mentor.md.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from distrec.cli import main
from distrec.data.dataset import Dataset, Interactions
from distrec.data.sampling import Triples
from distrec.errors import InputError
from distrec.methods.batch import Batch, Step, batch_of
from distrec.methods.mentor import CLEAN, NOISY, Draws
from distrec.methods.registry import method_config
from distrec.methods.workspace import Workspace
from distrec.parallel.partition import Partition
from distrec.parallel.world import World
from distrec.tables.spec import Side
from tests.distributed import run_workers
from tests.methods.bare import Bare, method_of
from tests.oracle.gather import sparse_entries
from tests.training import small
from tests.training.random_data import write_random

DIM = 8
MENTOR: dict[str, Any] = {"name": "mentor", "dim": DIM, "knn_k": 4, "mask_weight_g": 0.1}
INTENT = MENTOR | {"variant": "intent"}
SIDES: tuple[Side, Side] = ("user", "item")
UNPERTURBED: dict[str, Any] = {"mask_weight_g": 0.0}

# The towers and tables that each term's gradient reaches (4). The contrast of items does not depend on the users'
# weights (4.5), but the sum of both contrasts does.
ALIGNED = {"v", "t", "id", "id table", "weight"}
PUBLISHED = {
    "bpr": {"v", "t", "weight"},
    "align": ALIGNED,
    "nce_user": {*NOISY, "weight"},
    "nce_item": set(NOISY),
    "mask": set(),
}
PAPER = {
    "bpr": {"v", "t", "weight"},
    "align": ALIGNED,
    "nce_user": {"v", "t", "weight"},
    "nce_item": {"v", "t"},
    "mask": {"v", "t", "weight", "mask layer"},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return Dataset.open(write_random(tmp_path_factory.mktemp("data") / "random", 30, 14, 102, 0))


def alone(data: Dataset, **settings: Any) -> Bare:
    return Bare(World(0, 1), data, MENTOR | settings)


def reached(bare: Bare, term: torch.Tensor) -> dict[str, dict[str, bool]]:
    """For each part of each tower and table, whether the term has any non-zero gradient there."""
    grads = bare.gradients(term)
    moved = {name: grad is not None and bool(grad.abs().max() > 0) for name, grad in grads.items()}
    preference = grads["preference"]
    out = {"id table": {"table": moved["id"]}, "weight": {"table": moved["weight"]}}
    for number, tower in enumerate(bare.method.towers):
        columns = slice(number * DIM, (number + 1) * DIM)
        out[tower] = {"preference": preference is not None and bool(preference[:, columns].abs().max() > 0)}
        for layer in ("first", "second"):
            out[tower] |= {f"{layer} {kind}": moved[f"{layer}.{tower}.{kind}"] for kind in ("weight", "bias")}
    if bare.method.intent:
        out["mask layer"] = {kind: moved[f"mask.{kind}"] for kind in ("weight", "bias")}
    return out


@pytest.mark.parametrize(("variant", "table"), [("published", PUBLISHED), ("intent", PAPER)])
def test_each_term_reaches_what_the_specification_says_and_nothing_else(
    data: Dataset, variant: str, table: dict[str, set[str]]
):
    bare = alone(data, variant=variant)
    terms = bare.method.loss(bare.batch())
    assert terms.keys() == {*table, "reg"}
    for name, wanted in table.items():
        for place, parts in reached(bare, terms[name]).items():
            assert parts == dict.fromkeys(parts, place in wanted), f"{name} at {place}"


@pytest.mark.parametrize("variant", ["published", "intent"])
def test_the_norm_reaches_the_batch_s_users_of_two_tables_and_all_weights(data: Dataset, variant: str):
    """4.2, exactly: the gradient is that of two mean squares."""
    bare = alone(data, variant=variant, reg_weight=0.5)
    batch = bare.batch(20)
    grads = bare.gradients(bare.method.loss(batch)["reg"])
    preference = bare.tables["preference"].detach()
    wanted = torch.zeros_like(preference)
    wanted[:, : 2 * DIM] = preference[:, : 2 * DIM] * torch.bincount(batch.users.ids, minlength=30).unsqueeze(1)
    torch.testing.assert_close(grads["preference"], wanted * 2 * 0.5 / (20 * DIM))
    torch.testing.assert_close(grads["weight"], bare.tables["weight"].detach() * 0.5 / 30)
    others = [grad for name, grad in grads.items() if name not in ("preference", "weight")]
    assert all(grad is None or not grad.any() for grad in others)


VARIANTS = [
    {},
    UNPERTURBED,
    {"variant": "intent"},
    {"variant": "intent"} | UNPERTURBED,
    {"variant": "intent", "mask_weight_f": 0.0},
    {"mask_weight_f": 0.0},
]


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_every_parameter_that_exists_is_trained(data: Dataset, settings: dict[str, Any]):
    """The layers that have no gradient in the released program (3.5) do not exist here."""
    bare = alone(data, **settings)
    towers = CLEAN + (NOISY if bare.method.noisy and not bare.method.intent else [])
    assert bare.method.towers == towers
    assert {name: table.shape[1] for name, table in bare.tables.items()} == {
        "preference": DIM * len(towers), "id": DIM, "weight": 2,
    }  # fmt: skip
    dense = {
        f"{layer}.{tower}.{kind}" for layer in ("first", "second") for tower in towers for kind in ("weight", "bias")
    }
    assert set(bare.dense) - {"mask.weight", "mask.bias"} == dense
    total = torch.stack(list(bare.method.loss(bare.batch()).values())).sum()
    for name, grad in bare.gradients(total).items():
        assert grad is not None, f"{name} is never trained"
        assert grad.any(), f"{name} is never trained"


@pytest.mark.parametrize("settings", [UNPERTURBED, UNPERTURBED | {"variant": "intent"}], ids=str)
def test_without_contrast_there_are_no_noisy_towers(data: Dataset, settings: dict[str, Any]):
    class NoNoise(Draws):
        def noise(self, *_: Any) -> torch.Tensor:
            raise AssertionError("noise is drawn")

    bare = alone(data, **settings)
    bare.method.draws = NoNoise()
    assert not {"nce_user", "nce_item"} & bare.method.loss(bare.batch()).keys()
    views = bare.method.views(bare.batch())
    assert views.users.shape == (30, 3 * DIM)
    assert views.items.shape == (14, 3 * DIM)
    assert not any("_n" in name for name in bare.dense)


def test_contrast_does_not_change_the_ranking_path(data: Dataset):
    """The other terms and the vectors are the same with and without noisy towers, in both variants (4)."""
    for variant in ("published", "intent"):
        found = []
        for contrast in (0.1, 0.0):
            bare = alone(data, variant=variant, mask_weight_g=contrast, mask_weight_f=0.0)
            same = torch.Generator().manual_seed(0)
            with torch.no_grad():
                for name, parameter in sorted(bare.dense.items()):
                    if name.split(".")[1] in CLEAN:
                        parameter.copy_(0.1 * torch.randn(parameter.shape, generator=same))
            terms, final = bare.method.loss(bare.batch()), bare.final()
            found.append([terms["bpr"], terms["reg"], terms["align"], final.users, final.items])
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


# --- noise ------------------------------------------------------------------------------------------------------------


def at(seed: int = 1, epoch: int = 0, step: int = 0) -> Batch:
    """A batch of this step."""
    one, place = np.zeros(1, np.int64), Partition(1, 1)
    return batch_of(World(0, 1), place, place, Triples(one, one, one, one), Step(seed, epoch, step, 1, 1))


def part(rows: int, rank: int = 0, size: int = 1) -> Workspace:
    """What a rank has of so many users and items."""
    counts: Any = SimpleNamespace(users=rows, items=rows)
    return Workspace(World(rank, size), counts, Interactions(*[np.empty(0, np.int64)] * 3))


@pytest.mark.parametrize("rows", [1, 10, 37])
@pytest.mark.parametrize("width", [1, 7, 64])
def test_draws_are_the_same_however_the_rows_are_cut(rows: int, width: int):
    draws = Draws()
    for draw in (
        lambda space: draws.noise(space, at(), 1, "user", width),
        lambda space: draws.keep(space, at(), "item", width, 0.3),
        lambda space: space.normal("user", width, at().key("noise")),
    ):
        whole = draw(part(rows))
        assert whole.shape == (rows, width)
        for size in (2, 3, 5):
            assert torch.equal(torch.cat([draw(part(rows, rank, size)) for rank in range(size)]), whole)


def test_draws_differ_wherever_they_are_used():
    draws, space = Draws(), part(20)
    places: list[tuple[Any, int, Any]] = [
        (at(), 0, "user"),
        (at(), 1, "user"),
        (at(), 0, "item"),
        (at(step=1), 0, "user"),
        (at(epoch=1), 0, "user"),
    ]
    places += [(at(seed=2), 0, "user"), (at(epoch=1, step=1), 0, "user")]
    noise = [draws.noise(space, *place, 28) for place in places]
    keep = [
        draws.keep(space, place, side, 16, 0.5)
        for place in (at(), at(step=1), at(epoch=1), at(seed=2))
        for side in SIDES
    ]
    for arrays in (noise, keep):
        assert len({array.numpy().tobytes() for array in arrays}) == len(arrays)
    assert all(array.min() >= 0 and array.max() < 1 for array in noise)
    assert abs(float(torch.cat(noise).mean()) - 0.5) < 0.02
    share = draws.keep(part(500), at(), "user", 40, 0.3)
    assert set(share.unique().tolist()) == {0, 1}
    assert float(share.mean()) == pytest.approx(0.7, abs=0.01)


def views_at_this_size(folder: str) -> list[list[torch.Tensor]]:
    """The whole towers after both graphs, in two steps of both variants."""
    world, data, out = World.current(), Dataset.open(folder), []
    for settings in (MENTOR, INTENT):
        bare = Bare(world, data, settings)
        for step in range(2):
            views = bare.method.views(bare.batch(32, step=step))
            out.append([bare.whole(views.users, bare.users), bare.whole(views.items, bare.items)])
    return out


@pytest.mark.multiprocess
@pytest.mark.parametrize("size", [2, 3])
def test_perturbed_towers_are_the_same_at_any_number_of_workers(size: int, tmp_path: Path):
    for number, shape in enumerate([(30, 14, 102, 0), (4, 40, 52, 1)]):
        folder = write_random(tmp_path / str(number), *shape)
        wanted = views_at_this_size(folder)
        for rank in run_workers(views_at_this_size, size, folder):
            for found, exact in zip(rank, wanted, strict=True):
                for one, other in zip(found, exact, strict=True):
                    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", ["published", "intent"])
def test_noise_falls_on_the_noisy_towers_only_and_anew_at_every_step(data: Dataset, variant: str):
    bare = alone(data, variant=variant)
    first, again, second = (bare.method.views(bare.batch(step=step)) for step in (0, 0, 1))
    columns = len(CLEAN) * DIM
    for rows, same, other in ((first.users, again.users, second.users), (first.items, again.items, second.items)):
        assert torch.equal(rows, same)
        assert torch.equal(rows[:, :columns], other[:, :columns])
        for tower in range(columns, rows.shape[1], DIM):
            assert not torch.equal(rows[:, tower : tower + DIM], other[:, tower : tower + DIM])
        if variant == "intent":  # noisy towers are the ranking's own plus noise of at most 0.1 per hop
            clean = torch.cat([rows[:, : 2 * DIM]] * 2, 1)
            gap = (rows[:, columns:] - clean).detach().abs().max()
            assert 0 < float(gap) < 1


# --- ranking ----------------------------------------------------------------------------------------------------------


def moved(bare: Bare) -> None:
    with torch.no_grad():
        for number, parameter in enumerate((*bare.tables.values(), *bare.dense.values())):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))


@pytest.mark.parametrize("variant", ["published", "intent"])
def test_stale_scores_are_those_of_the_last_step_s_forward(data: Dataset, variant: str):
    stale, fresh = (alone(data, variant=variant, stale_scores=choice) for choice in (True, False))
    with torch.no_grad():
        for step in range(3):
            before = fresh.final()
            for bare in (stale, fresh):
                bare.method.loss(bare.batch(step=step))
                moved(bare)
            found, after = stale.final(), fresh.final()
            for side in ("users", "items"):
                torch.testing.assert_close(getattr(found, side), getattr(before, side), rtol=1e-5, atol=1e-6)
                assert float((getattr(found, side) - getattr(after, side)).abs().max()) > 1e-2


def test_before_any_step_stale_scores_are_fresh(data: Dataset):
    stale, fresh = (alone(data, stale_scores=choice).final() for choice in (True, False))
    assert torch.equal(stale.users, fresh.users)
    assert torch.equal(stale.items, fresh.items)


@pytest.mark.parametrize("stale", ["false", "true"])
def test_a_finished_run_s_summary_is_that_of_its_best_checkpoint(tmp_path: Path, stale: str):
    """Metrics must not come from the last epoch's vectors: repeating the command gives the same summary."""
    data = small.write_small(tmp_path / "data")
    config = small.write_config(
        tmp_path / "run.yaml", data, tmp_path, "mentor", optimizer={"lr": 0.05}, train={"epochs": 5}
    )
    command = ["train", config, f"method.stale_scores={stale}"]
    assert main(command) == 0
    first = small.read(tmp_path / "run", "summary.json")
    assert first["best_epoch"] < 5, "this test needs a best epoch before the last one"
    assert main(command) == 0
    again = small.read(tmp_path / "run", "summary.json")
    assert (first["valid"], first["test"]) == (again["valid"], again["test"])


def test_the_title_names_the_variant(data: Dataset):
    assert [method_of(data, **settings).title() for settings in (MENTOR, INTENT)] == [
        "mentor (published)", "mentor (intent)",
    ]  # fmt: skip


# --- settings and data ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [("temperature", 0.0), ("temperature", -0.2), ("temperature", 0.01), ("knn_k", 0), ("knn_k", -3), ("dim", 0)]
    + [("item_layers", -1), ("dropout", 1.0), ("dropout", -0.1), ("image_weight", 1.1), ("image_weight", -0.1)]
    + [
        (f"{name}_weight{suffix}", -0.1)
        for name, suffix in (("reg", ""), ("align", ""), ("mask", "_f"), ("mask", "_g"))
    ]
    + [("variant", "paper"), ("fill", "median"), ("stale_scores", 1)],
)
def test_wrong_settings_are_refused_by_key(key: str, value: Any):
    with pytest.raises(InputError) as error:
        method_config(MENTOR | {key: value})
    assert str(error.value).startswith(f"key 'method.{key}' is {value!r}")
    assert "\n" not in str(error.value)


def test_features_that_do_not_exist_are_refused(data: Dataset):
    for key in ("image", "text"):
        with pytest.raises(InputError, match="has no feature 'sound'"):
            method_of(data, **MENTOR | {key: "sound"})


@pytest.mark.parametrize("k", [14, 15, 1000])
def test_with_fewer_items_than_k_everyone_is_everyone_s_neighbour(data: Dataset, k: int):
    bare = alone(data, knn_k=k, image_weight=0.3)
    entries = sparse_entries(bare.world, bare.method.item_item)
    assert entries.keys() == {(row, column) for row in range(14) for column in range(14)}
    np.testing.assert_allclose(list(entries.values()), 1 / 14, rtol=1e-6)
