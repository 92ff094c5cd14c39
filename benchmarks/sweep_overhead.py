"""The cost of a sweep beyond its trials: N identical short trials in a sweep against N bare training runs.

    python benchmarks/sweep_overhead.py --data DIR [--trials 6] [--epochs 60]

DIR is a prepared dataset. Both train LightGCN, one run after the other, each in one process. The bare runs are
`distrec train` in their own processes. A run's time is read from its files: "start" lasts until its folder is opened
(process, imports, checks), "training" from there until its summary, and "after" until the start of the next run (the
end of the process; in the sweep also Ray Tune's records and scheduling).
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml


def config(folder: Path, data: str, epochs: int) -> Path:
    tree = {
        "data": data,
        "run": {"name": "run", "storage": str(folder)},
        "method": {"name": "lightgcn"},
        "train": {"workers": 0, "epochs": epochs, "patience": epochs},
        "tracking": {"tensorboard": False},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def command(*arguments: str) -> float:
    started = time.time()
    subprocess.run([sys.executable, "-m", "distrec.cli", *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.time() - started


def opened(run: Path) -> float:
    return (run / "config.yaml").stat().st_mtime


def closed(run: Path) -> float:
    return (run / "summary.json").stat().st_mtime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--trials", type=int, default=6)
    parser.add_argument("--epochs", type=int, default=60)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = config(folder, str(Path(arguments.data).resolve()), arguments.epochs)
        bare_wall, begun = time.time(), []
        for number in range(arguments.trials):
            begun.append(time.time())
            command("train", str(path), f"run.name=bare-{number}", "evaluate.test=false")
        ended = time.time()
        bare_wall = ended - bare_wall
        bare = [folder / f"bare-{number}" for number in range(arguments.trials)]
        starts = [opened(run) - at for run, at in zip(bare, begun)]
        after = [following - closed(run) for run, following in zip(bare, [*begun[1:], ended])]

        sweep = folder / "sweep.yaml"
        entries = {f"m{number}": {"config": str(path)} for number in range(arguments.trials)}
        cpus = 0.6 * len(os.sched_getaffinity(0))  # more than half of the machine: one at a time
        tree = {
            "run": {"name": "sweep", "storage": str(folder)},
            "data": str(Path(arguments.data).resolve()),
            "methods": entries,
            "budget": {"trials": arguments.trials},
            "resources": {"cpus_per_worker": cpus},
            "seeds": 1,
        }
        sweep.write_text(yaml.safe_dump(tree))
        at = time.time()
        process = subprocess.Popen([sys.executable, "-m", "distrec.cli", "tune", str(sweep)], stdout=subprocess.DEVNULL)
        record = folder / "sweep" / "sweep.json"
        while not (
            record.exists() and yaml.safe_load(record.read_text())["closed"]
        ):  # the winners' seeds are not counted
            assert process.poll() is None, "the sweep ended early"
            time.sleep(0.1)
        search_end = time.time()
        process.terminate()
        process.wait()
        runs = sorted((folder / "sweep" / "trials").iterdir(), key=opened)
        gaps = [opened(following) - closed(run) for run, following in itertools.pairwise(runs)]

        def training(runs: list[Path]) -> float:
            return statistics.median(closed(run) - opened(run) for run in runs)

        n = arguments.trials
        print(f"{n} runs of {arguments.epochs} epochs, one at a time")
        print(
            f"bare   {bare_wall:7.1f} s: start {statistics.median(starts):.1f}, training {training(bare):.1f}, "
            f"after {statistics.median(after):.1f} s a run"
        )
        print(
            f"sweep  {search_end - at:7.1f} s: until the first run's folder {opened(runs[0]) - at:.1f}, "
            f"then training {training(runs):.1f}, from one run to the next {statistics.median(gaps):.1f} s"
        )
        bare_gap = statistics.median(starts) + statistics.median(after)
        beyond = n * (training(runs) - training(bare)) + (n - 1) * (statistics.median(gaps) - bare_gap)
        first = opened(runs[0]) - at - statistics.median(starts)
        print(
            f"beyond process start-up: {beyond:+.1f} s, {100 * beyond / bare_wall:+.1f} % of the bare runs; "
            f"starting Ray and Tune once: {first:+.1f} s"
        )


if __name__ == "__main__":
    main()
