"""BiVRec: the properties of the reconstruction (10), the effect of each released defect, its parts against plain loops.

Section numbers in brackets refer to docs/methods/bivrec.md.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distrec.data.dataset import Dataset
from distrec.data.histories import PADDING
from distrec.data.sampling import Windows
from distrec.errors import InputError
from distrec.methods.batch import Step, batch_of
from distrec.methods.bivrec import VIEWS, Draws
from distrec.methods.interests import GaussianAttention, Patches, allocation_distance
from distrec.methods.registry import method_config
from distrec.parallel.world import World
from tests.distributed import run_workers
from tests.methods.bare import SEED, Bare, method_of
from tests.training.random_data import write_random

BIVREC: dict[str, Any] = {"name": "bivrec", "dim": 8, "length": 6, "interests": 3, "dropout": 0.0}
PROTOTYPE = BIVREC | {"level": "prototype", "modality": "both"}
# The reconstruction with every new part switched off and every released defect switched on (10).
DEFECTS = {"pad_collision", "unmasked_content", "padded_sums", "noise_in_evaluation", "zero_tokens"}
SWITCHES = {"cluster_norm": "released", "nce": "released"} | dict.fromkeys(DEFECTS, True)
REDUCED = BIVREC | SWITCHES | {"scales": [1], "positions": False, "gaussian": "none", "lambda_f": 0.0, "lambda_mm": 0.0}
ALONE = World(0, 1)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_random(tmp_path_factory.mktemp("data") / "random", 30, 14, 302, 0)


@pytest.fixture(scope="module")
def data(path: str) -> Dataset:
    return Dataset.open(path)


def perturbed(data: Dataset, **settings: Any) -> Bare:
    """A method with perturbed weights, because many initial weights are zero or equal."""
    bare, generator = Bare(ALONE, data, settings), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for leaf in (bare.tables | bare.dense).values():
            leaf.add_(0.3 * torch.randn(leaf.shape, generator=generator))
    return bare


def outcome(bare: Bare) -> dict[str, torch.Tensor]:
    """Terms, the gradient of their sum, and the scores of all users and items."""
    terms = bare.method.loss(bare.batch())
    out = {f"term {name}": term.detach() for name, term in terms.items()}
    grads = bare.gradients(torch.stack(list(terms.values())).sum())
    out |= {f"grad {name}": grad for name, grad in grads.items() if grad is not None}
    with torch.no_grad():
        final = bare.final()
    return out | {"scores": bare.method.score(final.users, final.items)}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.allclose(one[key], other[key], rtol=1e-5, atol=1e-6) for key in one.keys() & other.keys())


# --- properties of the reconstruction ---------------------------------------------------------------------------------


def test_with_all_switches_the_reconstruction_is_the_prototype(data: Dataset):
    released, ours = outcome(perturbed(data, **PROTOTYPE)), outcome(perturbed(data, **REDUCED))
    assert released.keys() == ours.keys()
    assert same(released, ours)
    assert {"term ce_id", "term contrast"} == {key for key in ours if key.startswith("term")}


@pytest.mark.parametrize("key", [*sorted(SWITCHES), "scales", "positions", "gaussian", "lambda_f", "lambda_mm"])
def test_every_switch_matters(data: Dataset, key: str):
    if key == "zero_tokens":  # it affects initial values only, which `perturbed` changes
        starts = [Bare(ALONE, data, REDUCED | {key: on}).dense["views.mm.tokens"] for on in (True, False)]
        assert not starts[0].any() and starts[1].any()  # noqa: PT018
        return
    reduced, default = outcome(perturbed(data, **REDUCED)), dict(method_of(data, **BIVREC).config)[key]
    other = outcome(perturbed(data, **(REDUCED | {key: default})))
    assert not same(reduced, other) or reduced.keys() != other.keys()


@pytest.mark.parametrize("gaussian", ["feature", "position", "none"])
def test_how_interests_are_numbered_does_not_enter_the_allocation_term(data: Dataset, gaussian: str):
    order = torch.tensor([2, 0, 1])
    for allocation, unchanged in (("co_allocation", True), ("aligned", False)):
        bare = perturbed(data, **BIVREC, gaussian=gaussian, allocation=allocation)
        before = bare.method.loss(bare.batch())["allocation"]
        with torch.no_grad():
            for name in ("tokens", "gaussian.spread", "gaussian.centre"):
                if f"views.mm.{name}" in bare.dense:
                    leaf = bare.dense[f"views.mm.{name}"]
                    leaf.copy_(leaf[order])
        after = bare.method.loss(bare.batch())["allocation"]
        assert before > 1e-4
        assert torch.allclose(before, after, rtol=1e-5) == unchanged


@pytest.mark.parametrize("kind", ["co_allocation", "aligned"])
def test_equal_views_allocate_alike(data: Dataset, kind: Any):
    bare = perturbed(data, **BIVREC)
    net, real = (
        bare.net,
        torch.tensor([[False, True, True, True, True, True], [False] * 5 + [True], [False] * 6]),
    )
    x, y = torch.randn(2, 3, 6, 8, generator=torch.Generator().manual_seed(1))

    def distance() -> torch.Tensor:
        (_, one, there), (_, other, _) = (
            net.interests(view, rows, real, None) for view, rows in (("id", x), ("mm", z))
        )
        return allocation_distance(one.log_softmax(1), other.log_softmax(1), there, kind)

    z = x
    assert (distance() > 0)[:2].all()
    net.views["mm"].load_state_dict(net.views["id"].state_dict())
    assert distance().tolist() == [0, 0, 0]
    z = y
    assert (distance() > 0).tolist() == [True, True, False]  # the last history is empty


def longer(state: dict[str, torch.Tensor], short: Any, long: Any) -> dict[str, torch.Tensor]:
    """The weights for a method with longer histories, where vectors of place are aligned at the newest item."""
    out = dict(state)
    for name, value in state.items():
        if name.endswith("patches.place"):
            wide = torch.randn(sum(long.patches), value.shape[1], generator=torch.Generator().manual_seed(8))
            for mine, theirs in zip(wide.split(long.patches), value.split(short.patches), strict=True):
                mine[len(mine) - len(theirs) :] = theirs
            out[name] = wide
        elif name.endswith("gaussian.places"):
            out[name] = torch.tensor(long.centres())
    return out


@pytest.mark.parametrize("length", [7, 9, 14])
@pytest.mark.parametrize("gaussian", ["feature", "position"])
@pytest.mark.parametrize("cluster_norm", ["groupvit", "released"])
def test_padding_changes_nothing(data: Dataset, length: int, gaussian: str, cluster_norm: str):
    settings = BIVREC | {"gaussian": gaussian, "cluster_norm": cluster_norm, "gumbel": "close"}
    bare, padded = perturbed(data, **settings), Bare(ALONE, data, settings | {"length": length})
    patches = [made.net.views["id"].patches for made in (bare, padded)]
    padded.net.load_state_dict(longer(bare.net.state_dict(), *patches))
    with torch.no_grad():
        padded.tables["item"].copy_(bare.tables["item"])
    windows = bare.samples(32)
    assert same(terms_of(bare, windows), terms_of(padded, windows))


def terms_of(bare: Bare, windows: Windows) -> dict[str, torch.Tensor]:
    """The terms for these windows, padded to the method's length."""
    wide = np.full((len(windows.users), bare.method.config.length + 1), PADDING)
    wide[:, -windows.items.shape[1] :] = windows.items
    samples = Windows(windows.users, wide, windows.rows)
    batch = batch_of(ALONE, bare.users, bare.items, samples, Step(SEED, 0, 0, len(wide), len(wide)))
    return {name: term.detach() for name, term in bare.method.loss(batch).items()}


def test_padding_changes_the_prototype(data: Dataset):
    bare, padded = (perturbed(data, **(PROTOTYPE | {"gumbel": "close", "length": length})) for length in (6, 9))
    windows = bare.samples(32)
    assert not same(terms_of(bare, windows), terms_of(padded, windows))


def shares(path: str, settings: list[dict[str, Any]], batches: list[int]) -> list[dict[str, torch.Tensor]]:
    """For each batch size and method, the terms and gradients summed over ranks."""
    world, out = World.current(), []
    for size, each in product(batches, settings):
        bare = Bare(world, Dataset.open(path), each)
        with torch.no_grad():
            for name, leaf in bare.dense.items():
                leaf.add_(0.3 * torch.randn(leaf.shape, generator=torch.Generator().manual_seed(len(name))))
        terms = bare.method.loss(bare.batch(size))
        found = {name: world.sum_(term.detach().double().clone()) for name, term in terms.items()}
        grads = bare.gradients(torch.stack(list(terms.values())).sum())
        found["grad item"] = bare.whole(grads.pop("item"), bare.items)
        for name, leaf in bare.dense.items():
            grad = grads[name]
            found[f"grad {name}"] = world.sum_(torch.zeros_like(leaf).detach() if grad is None else grad.clone())
        out.append(found)
    return out


@pytest.mark.multiprocess
@pytest.mark.parametrize("size", [2, 4])
def test_terms_and_gradients_are_those_of_one_process(path: str, size: int):
    """Some batches leave some ranks without a row, and one batch has a single row."""
    settings = [BIVREC, PROTOTYPE, BIVREC | {"nce": "intended", "gaussian": "position", "allocation": "aligned"}]
    alone = run_workers(shares, 1, path, settings, [29, 3, 1])[0]
    for result in run_workers(shares, size, path, settings, [29, 3, 1]):
        for found, wanted in zip(result, alone, strict=True):
            assert found.keys() == wanted.keys()
            for key, value in wanted.items():
                close = {"rtol": 1e-6, "atol": 1e-6} if value.ndim == 0 else {"rtol": 1e-4, "atol": 1e-5}
                torch.testing.assert_close(found[key], value, **close, msg=lambda m, key=key: f"{key}: {m}")


# --- single switches and parts ----------------------------------------------------------------------------------------


def test_the_collision_keeps_item_0_from_learning_by_look_ups_and_from_being_recommended(data: Dataset):
    for collision in (True, False):
        bare = perturbed(data, **(REDUCED | {"pad_collision": collision}))
        batch = bare.batch()
        assert (batch.windows[:, :-1] == 0).any()  # item 0 is in a history
        terms = bare.method.loss(batch)
        grads = {name: bare.gradients(term)["item"] for name, term in terms.items()}
        assert bool(grads["contrast"][0].any()) != collision  # it reaches the table through look-ups only
        assert grads["contrast"][1:].any(1).sum() > 3
        assert grads["ce_id"][0].any()  # through the softmax over all items
        with torch.no_grad():
            final = bare.final()
        scores = bare.method.score(final.users, final.items)
        assert (scores.argmin(1) == 0).all() == collision
        assert scores.isfinite().all()


def test_items_outside_the_batch_learn_from_no_contrast(data: Dataset):
    bare = perturbed(data, **BIVREC)
    batch = bare.batch(3)
    history = torch.unique(batch.windows[:, :-1])
    grad = bare.gradients(bare.method.loss(batch)["contrast"])["item"]
    assert set(grad.any(1).nonzero().flatten().tolist()) == set(history[history >= 0].tolist())


@pytest.mark.parametrize("nce", ["released", "intended", "clip"])
def test_each_contrast_is_its_formula(data: Dataset, nce: str):
    bare = perturbed(data, **BIVREC, nce=nce)
    batch = bare.batch(13)
    seen = bare.method._read(bare.net, batch)
    ids, contents = (torch.nn.functional.normalize(seen[f"z_{view}"], dim=1) for view in VIEWS)
    similar = (ids @ contents.t() / 0.07).double()
    others = torch.stack([torch.cat([row[:i], row[i + 1 :]]).logsumexp(0) for i, row in enumerate(similar)])
    wanted = {
        "released": others.mean() - similar.mean(),
        "intended": (others - similar.diagonal()).mean(),
        "clip": sum(torch.nn.functional.cross_entropy(s, torch.arange(13)) for s in (similar, similar.t())) / 2,
    }[nce]
    found = bare.method.loss(batch)["contrast"]
    assert float(found.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)


@pytest.mark.parametrize("length", [1, 4, 7, 12])
def test_patches_against_a_plain_loop(length: int):
    generator = torch.Generator().manual_seed(length)
    patches = Patches(3, length, [1, 2, 4], positions=True)
    x, real = torch.randn(5, length, 3, generator=generator), torch.rand(5, length, generator=generator) < 0.6
    real[0] = False
    start, _ = patches(x, real)
    for parameter in patches.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    found, there = patches(x, real)
    for row in range(5):
        at = 0
        for number, p in enumerate(patches.scales):
            for k in range(patches.patches[number]):
                ends = length - (patches.patches[number] - 1 - k) * p  # the last patch ends with the newest item
                items = [(r, s) for r, s in enumerate(range(ends - p, ends)) if s >= 0 and real[row, s]]
                assert there[row, at] == bool(items)
                if items:
                    mean = torch.stack([x[row, s] for _, s in items]).mean(0)
                    assert torch.allclose(start[row, at], mean, atol=1e-6)
                    mixes = [x[row, s] if p == 1 else getattr(patches, f"mix_{p}")[r] @ x[row, s] for r, s in items]
                    wanted = torch.stack(mixes).sum(0) * p / len(items) + patches.place[at] + patches.scale[number]
                    assert torch.allclose(found[row, at], wanted, atol=1e-5)
                at += 1
        assert at == patches.tokens == len(patches.centres())
    assert patches.centres()[length - 1] == 0


def test_gaussian_attention_starts_as_nothing_and_is_its_formula():
    generator = torch.Generator().manual_seed(0)
    layer = GaussianAttention(16, 3, "feature", [0.0, 1.0, 2.0, 3.0, 4.0])
    sigma = torch.nn.functional.softplus(layer.spread) + 1e-3
    assert torch.allclose(2 * sigma**2, torch.tensor(2 * 16**0.5), rtol=1e-5)
    tokens, x = torch.randn(2, 3, 16, generator=generator), torch.randn(2, 5, 16, generator=generator)
    real = torch.tensor([[False, True, True, False, True], [False] * 5])
    torch.nn.init.zeros_(layer.out.weight)
    assert layer(tokens, x, real).equal(tokens)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=generator)
    found, sigma = layer(tokens, x, real), torch.nn.functional.softplus(layer.spread) + 1e-3
    distance = torch.cdist(layer.query(tokens), layer.key(x)).square() / (2 * sigma.square()).unsqueeze(1)
    weights = (-distance[0][:, real[0]]).softmax(-1)
    wanted = tokens[0] + layer.out(weights @ layer.value(x[0, real[0]]))
    assert torch.allclose(found[0], wanted, atol=1e-5)
    assert found[1].equal(tokens[1])  # nothing to attend to


def test_noise_depends_on_the_place_in_the_epoch_alone(data: Dataset):
    bare, draws = Bare(ALONE, data, BIVREC), Draws()
    whole = draws.training(bare.batch(12, epoch=1), "id", 3, 40)
    halves = [draws.training(bare.batch(6, epoch=1, step=step), "id", 3, 40) for step in (0, 1)]
    assert torch.cat(halves).equal(whole)
    assert not draws.training(bare.batch(12, epoch=1), "mm", 3, 40).equal(whole)
    assert not draws.training(bare.batch(12, epoch=2), "id", 3, 40).equal(whole)
    users = np.arange(900)
    many = draws.evaluation(users, "id", 3, 40)
    assert torch.cat([draws.evaluation(part, "id", 3, 40) for part in (users[:7], users[7:7], users[7:])]).equal(many)
    assert float(many.mean()) == pytest.approx(0.5772, abs=0.02)
    assert float(many.var()) == pytest.approx(np.pi**2 / 6, abs=0.03)
    assert many.isfinite().all()


def test_a_ranking_repeats_itself_and_joins_the_views_by_adding(data: Dataset):
    scores = {}
    for view in ("id", "mm", "both"):
        bare = perturbed(data, **BIVREC, rank_by=view)
        with torch.no_grad():
            first, again = bare.final(), bare.final()
        assert first.users.equal(again.users)
        scores[view] = bare.method.score(first.users, first.items)
        assert bare.method.title() == f"bivrec (reconstruction, ranked by {view})"
        interests, items = first.users[:, -1], first.items[:, -1]
        best = (interests.unsqueeze(2) * items).sum(-1).amax(1)
        assert torch.allclose(best, scores["mm" if view == "both" else view], atol=1e-4)
    assert torch.allclose(scores["both"], scores["id"] + scores["mm"], atol=1e-4)
    assert {view: slice(place, place + 1) for place, view in enumerate(VIEWS)} == bare.method.branches()
    for view, part in bare.method.branches().items():
        assert torch.allclose(bare.method.score(first.users[:, part], first.items[:, part]), scores[view], atol=1e-4)
    assert method_of(data, **PROTOTYPE).title() == "bivrec (prototype)"


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"interests": 0}, "key 'method.interests' is 0 but must be greater than or equal to 1"),
        ({"length": 0}, "key 'method.length' is 0"),
        ({"tau": 0.0}, "key 'method.tau' is 0.0 but must be greater than 0"),
        ({"tau_a": 0.0}, "key 'method.tau_a' is 0.0 but must be greater than 0"),
        ({"temperature": 0.0}, "key 'method.temperature' is 0.0"),
        ({"lambda_f": -0.1}, "key 'method.lambda_f' is -0.1 but must be greater than or equal to 0"),
        ({"scales": [2, 1]}, "key 'method.scales' is [2, 1] but must be sizes in ascending order"),
        ({"scales": [0, 1]}, "key 'method.scales.0' is 0 but must be greater than or equal to 1"),
        ({"level": "a"}, "key 'method.level' is 'a'"),
        (
            {"level": "prototype", "gaussian": "feature"},
            "key 'method.gaussian' is 'feature' but level 'prototype' has no such part; remove the key or set "
            "'method.level' to 'reconstruction'.",
        ),
        (
            {"level": "prototype", "scales": [1, 2]},
            "key 'method.scales' is [1, 2] but level 'prototype' has no such part",
        ),
        ({"level": "prototype", "lambda_mm": 1.0}, "key 'method.lambda_mm' is 1.0 but level 'prototype'"),
    ],
)  # fmt: skip
def test_wrong_settings_are_refused_by_key(settings: dict[str, Any], told: str):
    with pytest.raises(InputError) as error:
        method_config({"name": "bivrec"} | settings)
    assert str(error.value).startswith(told)


def test_what_only_the_data_or_two_keys_can_tell_is_refused_too(data: Dataset, tmp_path: Path):
    with pytest.raises(InputError, match=r"'method.shelter' is 4 but there are 3 interests"):
        method_of(data, **BIVREC, shelter=4)
    with pytest.raises(InputError, match="has no feature 'sound'"):
        method_of(data, **BIVREC, text="sound")
    method_of(data, **BIVREC, text="sound", modality="image")


def test_the_prototype_starts_from_the_released_settings(data: Dataset):
    config = dict(method_config({"name": "bivrec", "level": "prototype"}))
    assert {key: config[key] for key in SWITCHES} == SWITCHES
    assert (config["modality"], config["dropout"], config["lambda_mm"], config["scales"]) == ("image", 0.5, 0.0, [1])
    reconstruction = dict(method_config({"name": "bivrec"}))
    assert not any(reconstruction[key] for key in DEFECTS)
    told = method_of(data, **BIVREC).degradations()
    assert all("items lack feature" in sentence for sentence in told)
    assert len(told) == 2  # items lack both of the random feature sets
