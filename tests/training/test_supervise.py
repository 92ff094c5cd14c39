"""A run whose hosts are lost, join and are taken away goes on with as many workers as there are, to the same end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from distrec.cluster import capacity
from distrec.config import load_run
from distrec.data.storage import open_folder
from distrec.errors import InputError, Interrupted
from distrec.training import attempts, group, policy
from distrec.training.launch import train
from distrec.training.run_folder import RunFolder
from distrec.training.worker import train_worker
from tests.training import small
from tests.training.hosts import Hosts

EPOCHS = 5000  # more than it takes; the run is stopped


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    with Hosts(tmp_path) as started:
        yield started


@pytest.mark.multiprocess
def test_workers_follow_the_hosts_to_the_same_end(
    tmp_path: Path, hosts: Hosts, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(policy, "GROW_AFTER", 1.0)
    monkeypatch.setattr(group, "_LOOK_AT_ROOM", 1.0)
    monkeypatch.setattr(capacity, "SETTLE", 2.0)
    nodes = [hosts.add(), hosts.add()]
    run, data = tmp_path / "run", small.write_small(tmp_path / "data")
    config = small.write_config(
        tmp_path / "run.yaml", data, tmp_path, "lightgcn",
        train={"global_batch": 8, "epochs": EPOCHS, "patience": EPOCHS, "eval_every": 20, "workers": [1, 2],
               "cpus_per_worker": 1},
    )  # fmt: skip

    def sizes() -> list[int]:
        """The numbers of workers that trained one after the other, so far."""
        found: list[int] = []
        for epoch in small.metrics(run) if (run / "metrics.jsonl").exists() else []:
            found += [epoch["workers"]] if [epoch["workers"]] != found[-1:] else []
        return found

    def wait(ready: Callable[[], Any], running: Any) -> None:
        deadline = time.monotonic() + 150
        while not ready():
            assert not running.done(), running.result()
            assert time.monotonic() < deadline, sizes()
            time.sleep(0.1)

    with ThreadPoolExecutor() as pool:
        running = pool.submit(train, config)
        wait(lambda: sizes() == [2], running)
        hosts.kill(nodes[0])
        wait(lambda: sizes() == [2, 1], running)
        hosts.add()
        wait(lambda: sizes() == [2, 1, 2], running)
        hosts.drain(nodes[1], seconds=120)
        wait(lambda: sizes() == [2, 1, 2, 1], running)
        RunFolder(open_folder(str(run))).request_stop()
        with pytest.raises(Interrupted):
            running.result(60)
    assert sizes() == [2, 1, 2, 1]

    (attempt,) = small.read(run, "run.json")["attempts"]
    assert attempt["outcome"] == "Interrupted"
    causes = [restart["cause"] for restart in attempt["restarts"]]
    assert [restart["workers"] for restart in attempt["restarts"]] == [1, 2, 1]
    assert "was lost, with worker" in causes[0]
    assert causes[0].endswith("; failure 1 of 3 since the last finished epoch")
    assert causes[1] == "workers saved a checkpoint, because the cluster has room for more of them"
    assert causes[2] == "workers saved a checkpoint, because hosts will be taken away"
    told = capsys.readouterr().out
    assert [cause for cause in causes if cause not in told] == []
    assert all(restart["start"]["epoch"] > 0 for restart in attempt["restarts"])
    epochs = small.metrics(run)
    assert sum(epoch["replayed"] > 0 for epoch in epochs) <= 1  # only the lost host's; the others saved first
    assert all(epoch["ledger"]["lost"] == epoch["ledger"]["duplicated"] == 0 for epoch in epochs)

    train(config, ["train.workers=0", "run.name=whole", f"train.epochs={len(epochs)}"])
    small.same_losses(tmp_path / "whole", run, rtol=1e-4)


def test_a_host_that_does_not_see_the_run_or_the_data_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "_SHOWN_SECONDS", 0.0)
    monkeypatch.setattr("socket.gethostname", lambda: "w2")
    data = small.write_small(tmp_path / "data")
    config = load_run(small.write_config(tmp_path / "run.yaml", data, tmp_path))
    with pytest.raises(InputError, match=r"'run\.storage' is .*host 'w2' does not see .*give a folder that all hosts"):
        train_worker(config, attempt=1)
    RunFolder.of(config).open_attempt(config, "hash")
    with pytest.raises(InputError, match="does not see"):
        train_worker(config, attempt=2)  # an old copy of the folder
    with pytest.raises(InputError, match=r"'data' is .*, which is not on host 'w2'"):
        train_worker(config.model_copy(update={"data": str(tmp_path / "elsewhere")}), attempt=1)
