"""What README says of several hosts, without faults: encode, train and tune, submitted from a client."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.lab.cluster import SECRET, Cluster
from tests.lab.faults import CONFIG, EPOCHS, LR, SETTINGS, STEPS, Undisturbed
from tests.lab.site import DATA, RUNS
from tests.training import small

pytestmark = pytest.mark.lab


def test_encode_on_three_hosts(site: Cluster, encoded: str) -> None:
    assert "text: 1,000 items encoded" in encoded
    assert "image: 1,000 items encoded" in encoded
    features = json.loads(site.storage.read("data/manifest.json") or b"{}")["features"]
    assert features.keys() == {"text", "image"}


def test_a_run_on_three_hosts_ends_as_in_one_process(site: Cluster, undisturbed: Undisturbed, tmp_path: Path) -> None:
    """The client has a version of the code that the hosts do not have: it must be the one that runs."""
    code = site.lab["client"].tmp / "work/distrec/cli.py"
    code.write_text(code.read_text() + '\nprint("uploaded by the client", file=sys.stderr)\n')
    own = (f"run.storage={RUNS}", "run.name=plain", "train.workers=3", "tracking.tensorboard=true")
    job = site.distrec_submit("plain", "train", CONFIG, *SETTINGS, *own)
    output = site.done("plain", job, 300)
    assert "uploaded by the client" in output
    assert "alignrec: best epoch" in output

    run = site.storage.fetch("runs/plain", tmp_path / "plain")
    assert {epoch["workers"] for epoch in small.metrics(run)} == {3}
    alone = undisturbed.run()
    small.same_losses(alone, run, rtol=1e-5)
    small.same_tensors(small.tensors(alone), small.tensors(run), LR, EPOCHS * STEPS)
    (attempt,) = small.read(run, "run.json")["attempts"]
    assert attempt["outcome"] == "done"


def test_a_folder_that_hosts_do_not_share_is_refused(site: Cluster, encoded: str) -> None:
    """Every host has a /tmp of its own, so a worker does not see what the driver writes there."""
    own = ("run.storage=/tmp/own", "run.name=own", "train.workers=3")
    submitted = site.distrec_submit("own", "train", CONFIG, *SETTINGS, *own)
    assert submitted.wait(200) == 2, submitted.tail()
    output = submitted.text()
    assert "key 'run.storage' is '/tmp/own', but host 'w" in output
    assert "starting again" not in output


def test_what_no_host_can_run_is_refused_at_once(site: Cluster, encoded: str) -> None:
    own = (f"run.storage={RUNS}", "run.name=large", "train.workers=1", "train.cpus_per_worker=64")
    submitted = site.distrec_submit("large", "train", CONFIG, *SETTINGS, *own)
    assert submitted.wait(120) == 2, submitted.tail()
    assert "largest host of the cluster has 1" in submitted.text()


def test_a_sweep_on_three_hosts(site: Cluster, encoded: str, tmp_path: Path) -> None:
    sweep = {
        "run": {"name": "sweep", "storage": RUNS},
        "data": DATA,
        "metric": "recall@20",
        "methods": {
            "bprmf": {"config": "configs/bprmf/demo.yaml", "space": {"optimizer.lr": {"low": 1e-3, "high": 2e-2}}},
            "popularity": {"config": "configs/popularity/demo.yaml"},
        },
        "budget": {"trials": 4, "epochs": 2},
        "seeds": 1,
    }
    (site.lab["client"].tmp / "work/sweep.yaml").write_text(yaml.safe_dump(sweep))
    site.done("sweep", site.distrec_submit("sweep", "tune", "sweep.yaml"), 300)
    record = json.loads(site.storage.read("runs/sweep/sweep.json") or b"{}")
    assert record["done"]
    assert record["winners"].keys() == {"bprmf", "popularity"}
    trials = [key for key in site.storage.keys("runs/sweep/trials/") if key.endswith("trial.json")]
    assert {json.loads(site.storage.read(key) or b"{}")["status"] for key in trials} == {"done"}


def test_no_secret_is_in_anything_written(site: Cluster, encoded: str) -> None:
    """The keys of the storage are in the environment of the nodes' processes, and must be nowhere else."""
    secret, found = SECRET.encode(), []
    for folder in (site.lab.folder / "hosts", site.lab.logs):
        for path in folder.rglob("*"):
            if path.is_file() and not path.is_symlink() and secret in path.read_bytes():
                # The lab's own source has the secret, and so has the client's copy of it.
                found += [] if path.match("tests/lab/*") else [str(path)]
    found += [key for key in site.storage.keys("") if secret in (site.storage.read(key) or b"")]
    for host in site.lab.hosts.values():
        found += [process.command for process in host.processes() if SECRET in process.command]
    assert secret not in (site.get("api/jobs/") or "").encode()
    assert found == []
