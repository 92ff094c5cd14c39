"""What follows when workers have ended: decisions without a cluster."""

from __future__ import annotations

import random

import pytest

from distrec.errors import InputError, Interrupted, NonFiniteLoss, StorageError, WorkersFailed
from distrec.training.policy import GROW_AFTER, SILENT, Decision, End, Failures, decide, frozen, may_grow
from distrec.training.run_folder import TakenOver

LOST = RuntimeError("the process died")


def lost(progress: int = 0, **more: bool) -> End:
    return End({1: LOST}, "worker 1 died", lost=True, progress=progress, **more)


def test_workers_that_all_finished_end_the_run() -> None:
    assert decide(End({}), Failures(), 0) == Decision("finish", Failures())


@pytest.mark.parametrize("error", [InputError("x"), TakenOver("x"), NonFiniteLoss("x")])
@pytest.mark.parametrize("beside", [{}, {0: LOST}, {2: LOST}, {0: StorageError("s")}])
def test_what_a_retry_would_meet_again_is_raised_at_once(error: Exception, beside: dict[int, BaseException]) -> None:
    """Whatever the other workers met when this one was gone."""
    assert decide(End({**beside, 1: error}, lost=True, taken=True), Failures(), 1000).error is error


def test_a_stop_is_passed_on_and_a_resize_goes_on_without_counting() -> None:
    stopped = {0: Interrupted("stopped"), 1: Interrupted("stopped")}
    for asked in (None, "stop"):
        assert decide(End(stopped, asked=asked), Failures(2, 0), 3).error is stopped[0]
    for asked in ("resize", "preempted"):
        decision = decide(End(stopped, "w", asked=asked), Failures(2, 0), 3)
        assert (decision.action, decision.failures) == ("again", Failures(2, 0))
        assert decision.why.startswith("workers saved a checkpoint, because ")


def test_hosts_that_were_announced_to_leave_do_not_count() -> None:
    for end in (lost(taken=True), End({1: LOST}, "w", lost=True, asked="preempted")):
        decision = decide(end, Failures(3, 0), 3)
        assert (decision.action, decision.failures) == ("again", Failures(3, 0))
        assert "does not count" in decision.why


@pytest.mark.parametrize("most", [0, 1, 3])
def test_failures_without_progress_are_limited(most: int) -> None:
    failures = Failures()
    for count in range(1, most + 1):
        decision = decide(lost(progress=7), failures, most)
        assert decision.action == "again"
        assert decision.why == f"worker 1 died; failure {count} of {most} since the last finished epoch"
        failures = decision.failures
    decision = decide(lost(progress=7), failures, most)
    assert isinstance(decision.error, WorkersFailed)
    assert f"'train.max_failures' is {most}" in str(decision.error)
    assert decision.error.__cause__ is None
    raised = ValueError("of a worker")
    assert decide(End({0: raised}, "w", progress=7), failures, most).error.__cause__ is raised  # type: ignore[union-attr]


@pytest.mark.parametrize("seed", range(20))
def test_any_number_of_failures_is_survived_with_a_finished_epoch_between(seed: int) -> None:
    """The run gives up exactly when more than `most` failures follow each other at the same epoch."""
    draw = random.Random(seed)
    most, progress, failures, in_a_row = draw.randrange(4), 0, Failures(), 0
    for _ in range(200):
        if draw.random() < 0.4:
            progress, in_a_row = progress + draw.randrange(1, 3), 0
        in_a_row += 1
        decision = decide(lost(progress), failures, most)
        assert decision.action == ("raise" if in_a_row > most else "again")
        if decision.action == "raise":
            return
        failures = decision.failures


def test_frozen_workers_are_those_that_are_silent_for_longer_than_the_limit() -> None:
    silent = {0: 0.1, 1: SILENT[True] + 1, 2: SILENT[True] - 1, 3: 400.0}
    assert frozen(silent, dict.fromkeys(silent, True)) == [1, 3]
    assert frozen(silent, dict.fromkeys(silent, False)) == [3]  # starting takes the threads longer
    assert frozen({}, {}) == []


def test_workers_make_place_for_more_after_a_while_and_only_where_there_is_room() -> None:
    assert may_grow(1, 3, 1, GROW_AFTER)
    assert not may_grow(1, 3, 1, GROW_AFTER - 1)
    assert not may_grow(1, 3, 0, 1e9)
    assert not may_grow(3, 3, 2, 1e9)
