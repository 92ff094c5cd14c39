"""Time from the command to the first finished step, itemised.

    python benchmarks/startup.py --config CONFIG [--rounds 3] [--set key=value …]

Runs `distrec train CONFIG` in one process, with one and with two Ray workers, into a temporary storage. It watches from
outside when each milestone is reached: the run folder exists (configuration and data are checked), and the first step
is done. It also measures the imports alone in a new interpreter.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

IMPORTS = {
    "interpreter": "pass",
    "distrec.cli": "import distrec.cli",
    "torch": "import torch",
    "torchrec": "import torchrec",
    "deepspeed": "import deepspeed",
    "ray.train": "import ray.train.torch",
    "the engine": "import distrec.training.engine, distrec.training.loop, deepspeed",
}
LIMIT = 180.0


def imports(rounds: int) -> None:
    print("imports in a new interpreter, seconds (each includes its own imports)")
    for name, code in IMPORTS.items():
        times = []
        for _ in range(rounds):
            started = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True, timeout=LIMIT, capture_output=True)
            times.append(time.perf_counter() - started)
        print(f"  {name:14} {statistics.median(times):6.2f}", flush=True)


def milestones(config: str, workers: int, overrides: list[str]) -> list[float]:
    """Seconds from the command until the run folder is written, and until the first step is done."""
    with tempfile.TemporaryDirectory() as storage:
        run = Path(storage, "startup")
        command = [sys.executable, "-m", "distrec.cli", "train", config, "run.name=startup", f"run.storage={storage}"]
        started = time.perf_counter()
        process = subprocess.Popen(
            [*command, f"train.workers={workers}", *overrides],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            return [_appears(run / name, process, started) for name in ("run.json", "progress.json")]
        finally:
            process.send_signal(signal.SIGTERM)  # it saves a checkpoint and shuts its cluster down
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def _appears(path: Path, process: subprocess.Popen[bytes], started: float) -> float:
    while not path.exists():
        seconds = time.perf_counter() - started
        if process.poll() is not None or seconds > LIMIT:
            sys.exit(f"{path.name} was not written within {seconds:.0f} s")
        time.sleep(0.01)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value")
    arguments = parser.parse_args()
    print(f"load {os.getloadavg()[0]:.1f} before")
    imports(arguments.rounds)
    print(f"{arguments.config}: seconds from the command, median of {arguments.rounds}")
    for workers, what in ((0, "in process"), (1, "1 Ray worker"), (2, "2 Ray workers")):
        rounds = [milestones(arguments.config, workers, arguments.set) for _ in range(arguments.rounds)]
        checked, stepped = (statistics.median(times) for times in zip(*rounds, strict=True))
        print(f"  {what:14} checked and run folder written {checked:6.2f}, first step done {stepped:6.2f}", flush=True)


if __name__ == "__main__":
    main()
