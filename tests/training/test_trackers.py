"""Trackers are written to, and what goes wrong in one is a warning that ends no run."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
from torch.utils.tensorboard import SummaryWriter

from distrec.cli import main
from tests.training import small


@pytest.mark.parametrize("broken", ["__init__", "add_scalar", "close"])
def test_a_tracker_that_fails_ends_no_run(tmp_path: Path, broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = small.write_small(tmp_path / "data")
    config = small.write_config(tmp_path / "run.yaml", data, tmp_path, tracking={"tensorboard": True})
    calls = []

    def full(*_: Any, **__: Any) -> None:
        calls.append(broken)
        raise OSError(errno.ENOSPC, "No space left on device: http://me:secret@host/x")

    monkeypatch.setattr(SummaryWriter, broken, full)
    assert main(["train", config]) == 0
    assert len(calls) == 1  # then it is off
    assert len(small.metrics(tmp_path / "run")) == 3
    (warning,) = small.read(tmp_path / "run", "run.json")["warnings"]
    assert warning == (
        "TensorBoard is off for the rest of this attempt ([Errno 28] No space left on device: http://host/x); "
        "training goes on without it"
    )


def test_numbers_of_every_epoch_are_written(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    data = small.write_small(tmp_path / "data")
    config = small.write_config(tmp_path / "run.yaml", data, tmp_path, tracking={"tensorboard": True})
    assert main(["train", config]) == 0
    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    written = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    wanted = [(epoch["epoch"], pytest.approx(epoch["valid"]["recall@20"])) for epoch in small.metrics(tmp_path / "run")]
    assert written["valid/recall@20"] == wanted
    assert "warnings" not in small.read(tmp_path / "run", "run.json")
