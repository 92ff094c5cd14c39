"""Every registered method keeps the promises of docs/design.md, with the settings and transcriptions found beside it.

`beside.py` says what a new method brings. A method in `METHODS` is tested here without a change to any test.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from distrec.methods.registry import METHODS
from tests.distributed import run_workers
from tests.methods import beside, harness
from tests.methods.harness import CUT, EPOCH_STEPS, Job
from tests.training import small
from tests.training.random_data import write_random
from tests.training.trajectory import DATASETS, agree

TRAINED = [name for name in beside.present() if METHODS[name].trainable]
DATA = "more users"


def job(check: str, case: str, data: str = DATA, wide: bool = False) -> Any:
    return pytest.param((check, case, data), id=f"{case} on {data}", marks=pytest.mark.wide if wide else ())


# Methods on data where one of three workers has no users or no items, and variants on data with more items than users.
# On all data, workers have no rows of an epoch's last batch.
TRAJECTORIES = [
    job("trajectory", name, data) for name in beside.present() for data in (DATA, "fewest users", "fewest items")
]
TRAJECTORIES += [job("trajectory", case, "more items") for case in beside.cases() if "," in case]
TRAJECTORIES += [
    job("trajectory", case, data, wide=True)
    for case in beside.cases()
    for data in DATASETS
    if not data.startswith("fewest") and data != ("more items" if "," in case else DATA)
]
RUNS = [param for param in TRAJECTORIES if param.values[0][1].split(",")[0] in TRAINED]
SIZES = [2, 3, pytest.param(4, marks=pytest.mark.wide)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("every_method")
    for name, shape in DATASETS.items():
        write_random(path / name, *shape)
    return str(path)


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest, folder: str) -> Callable[[int, Job], list[Any]]:
    """The results of a check at a number of workers, by rank; each number is started once, for the selected tests."""
    here = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    needed: dict[int, dict[Job, None]] = {1: {}, 2: {}}
    for item in here:
        params = item.callspec.params
        if "job" not in params:
            continue
        (check, case, data), size = params["job"], params.get("size", 1)
        needed.setdefault(size, {})[check, case, data] = None
        if check in ("trajectory", "divided", "sparse", "proceed"):  # which are compared with one worker's
            needed[1]["sparse" if check == "sparse" else "trajectory", case, data] = None
        if check == "proceed":
            needed[2]["save", case, data] = None

    @cache
    def made(size: int) -> list[dict[Job, Any]]:
        jobs = list(needed[size])
        if size != 2 and any(check == "proceed" for check, *_ in jobs):
            made(2)  # which saves the checkpoints
        try:
            return run_workers(harness.work, size, folder, jobs, timeout=500)
        except (RuntimeError, TimeoutError) as error:  # kept, so that the other tests do not start the workers again
            return [dict.fromkeys(jobs, harness.Failure(error))]

    def of(size: int, job: Job) -> list[Any]:
        results = [results[job] for results in made(size) if job in results]
        for result in results:
            if isinstance(result, harness.Failure):
                pytest.fail(result, pytrace=False)
        return results

    return of


def test_every_method_has_small_settings_beside_it() -> None:
    lacking = [f"tests/methods/small/{name}.yaml" for name in beside.lacking()]
    assert lacking == [], "write these files, as tests/methods/beside.py says"
    assert list(beside.orphans()) == []


@pytest.mark.multiprocess
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("job", TRAJECTORIES)
def test_any_number_of_workers_gives_the_same_trajectory(found: Any, job: Job, size: int) -> None:
    agree(found(size, job)[0], found(1, job)[0], harness.run_of(*job[1:]))


@pytest.mark.multiprocess
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("job", [job("divided", name) for name in TRAINED if METHODS[name].sum_over_rows])
def test_micro_batches_give_the_same_trajectory(found: Any, job: Job, size: int) -> None:
    agree(found(size, job)[0], found(1, ("trajectory", *job[1:]))[0], harness.run_of(*job[1:]))


@pytest.mark.multiprocess
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("job", [job("sparse", name) for name in TRAINED if not METHODS[name].whole_tables])
def test_any_number_of_workers_gives_the_same_trajectory_with_sparse_tables(found: Any, job: Job, size: int) -> None:
    run = replace(harness.run_of(*job[1:]), optimizer=harness.SPARSE)
    agree(found(size, job)[0], found(1, job)[0], run)


@pytest.mark.multiprocess
@pytest.mark.parametrize("size", [1, *SIZES])
@pytest.mark.parametrize("job", RUNS)
def test_every_sample_is_trained_once_per_epoch(found: Any, job: Job, size: int) -> None:
    ledgers = found(size, job)[0]["ledgers"]
    assert ledgers
    for ledger in ledgers:
        assert ledger == {"expected": ledger["expected"], "trained": ledger["expected"], "duplicated": 0, "lost": 0}


@pytest.mark.multiprocess
@pytest.mark.parametrize("job", RUNS)
def test_a_run_does_train(found: Any, job: Job) -> None:
    """The first batch's loss falls and every weight changes. Scores of splits differ if the method reads histories.

    Otherwise the comparison would prove nothing.
    """
    result = found(1, job)[0]
    assert sum(result["again"].values()) < sum(result["terms"][0].values())
    assert [key for key, value in result["state"].items() if np.array_equal(value, result["start"][key])] == []
    same = np.array_equal(result["scores"]["valid"], result["scores"]["test"])
    assert same != METHODS[job[1].split(",")[0]].reads_histories


@pytest.mark.multiprocess
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("job", [job("proceed", name) for name in TRAINED])
def test_a_checkpoint_of_two_workers_goes_on_at_another_number(found: Any, job: Job, size: int) -> None:
    _, case, data = job
    saved, rest = found(2, ("save", case, data))[0], found(size, job)[0]
    assert saved.keys() == rest["start"].keys()
    assert [key for key, value in saved.items() if not np.array_equal(value, rest["start"][key])] == []
    whole = found(1, ("trajectory", case, data))[0]
    agree(rest, whole | {"terms": whole["terms"][CUT:]}, harness.run_of(case, data))


@pytest.mark.multiprocess
@pytest.mark.parametrize("size", [2, pytest.param(1, marks=pytest.mark.wide), pytest.param(3, marks=pytest.mark.wide)])
@pytest.mark.parametrize("job", [job("resume", name) for name in TRAINED])
def test_a_run_that_crashes_goes_on_bit_by_bit(found: Any, folder: str, job: Job, size: int) -> None:
    """Once at the end of an epoch and once within one, a step after a checkpoint. The runs' ledgers are checked too."""
    every = [(epoch, step) for epoch in range(harness.EPOCHS) for step in range(EPOCH_STEPS)]
    uninterrupted, *attempts = found(size, job)[0]
    assert uninterrupted == every
    assert attempts == [every[:EPOCH_STEPS], every[EPOCH_STEPS : 2 * EPOCH_STEPS + 3], every[2 * EPOCH_STEPS + 2 :]]
    whole, torn = (harness.runs_of(folder, job[1], size) / name for name in ("whole", "torn"))
    small.same_losses(whole, torn, rtol=0)
    want, got = small.tensors(whole), small.tensors(torn)
    assert want.keys() == got.keys()
    assert [name for name, value in want.items() if not value.equal(got[name])] == []
    first, second = small.read(whole, "summary.json"), small.read(torn, "summary.json")
    assert [first[split] for split in ("valid", "test")] == [second[split] for split in ("valid", "test")]


@pytest.mark.multiprocess
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("job", [job("poison", name) for name in TRAINED])
def test_a_loss_that_is_not_finite_is_raised_on_every_worker_and_moves_no_weight(
    found: Any, job: Job, size: int
) -> None:
    for rank in found(size, job):
        assert "at epoch 2, step 1; weights were not touched" in rank["error"]
        assert rank["moved"] == []


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("job", "size"),
    [
        pytest.param(("gradients", case, data), size, id=f"{case} on {data}-{size}")
        for case in harness.gradient_cases()
        for data, size in ((DATA, 1), ("more items", 3))
    ],
)
def test_terms_and_gradients_are_those_of_the_transcription(found: Any, job: Job, size: int) -> None:
    assert found(size, job)[0] == []
