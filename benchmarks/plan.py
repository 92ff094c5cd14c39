"""`distrec plan` against measured peaks: the memory that it predicts for a worker, and what a run took at most.

    python benchmarks/plan.py --data DIR --records build/plan.jsonl [--only baby movielens graph] [--methods …]

DIR holds the prepared datasets, each of which is made if it is missing: Amazon Baby and MovieLens from `--source`, the
folder with their raw data, with random features and tokens in the shape of the default encoders' where a method reads
them; and a random graph of two million nodes and forty million interactions. Runs train two epochs on Ray workers, and
rank and save. To rank the graph would take half an hour, so its runs are ended when the steps of an epoch are done, and
compared with what the plan says of them. Each adds a line to the file of records, and the same command goes on after
the last. The table of all records is printed at the end.

A worker's process without any data takes much of the memory at the smaller sizes, so the table also has the error of
what is beyond it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil

from distrec.data.dataset import Dataset
from distrec.data.manifest import FeatureEntry
from distrec.data.synth import GraphSize, write_graph
from distrec.sizing.likeness import add_features
from distrec.sizing.rehearsal import high_water

NODES, EDGES = 2_000_000, 40_000_000
LIMIT = {"baby": 0.15, "movielens": 0.15, "graph": 0.25}


@dataclass(frozen=True)
class Case:
    """A method at a size: its config, the data to use with it, and overrides."""

    size: str
    method: str
    config: str
    data: str
    overrides: tuple[str, ...] = ()


def _shapes(**sets: tuple[int, int]) -> dict[str, FeatureEntry]:
    return {
        name.replace("_", "-"): FeatureEntry(
            tokens=tokens, width=width, dtype="float16", missing=0, source="random", parts=[]
        )
        for name, (tokens, width) in sets.items()
    }


FEATURES = _shapes(text=(1, 384), image=(1, 1280), text_tokens=(30, 384), image_tokens=(9, 1280))
RANDOM = ("baby", "baby-next", "movielens-next")  # datasets that get them
TWO = ("train.epochs=2", "tracking.mlflow=null")
LARGE = ("train.global_batch=2097152", "train.epochs=1")  # an epoch of 16 steps
CASES = [
    Case("baby", "bprmf", "bprmf/baby", "baby"),
    Case("baby", "lightgcn", "lightgcn/baby", "baby"),
    Case("baby", "popularity", "popularity/baby", "baby"),
    Case("baby", "sasrec", "sasrec/baby-next", "baby-next"),
    Case("baby", "stair", "stair/movielens-benchmark", "baby"),
    Case("baby", "alignrec", "alignrec/movielens-benchmark", "baby"),
    Case("baby", "mentor", "mentor/movielens-benchmark", "baby"),
    Case("baby", "bivrec", "bivrec/movielens-next", "baby-next"),
    Case("baby", "odmt", "odmt/movielens-next", "baby-next", ("train.global_batch=512",)),
    Case("movielens", "bprmf", "bprmf/movielens-benchmark", "movielens-benchmark"),
    Case("movielens", "lightgcn", "lightgcn/movielens-benchmark", "movielens-benchmark"),
    Case("movielens", "popularity", "popularity/movielens-benchmark", "movielens-benchmark"),
    Case("movielens", "stair", "stair/movielens-benchmark", "movielens-benchmark"),
    Case("movielens", "alignrec", "alignrec/movielens-benchmark", "movielens-benchmark"),
    Case("movielens", "mentor", "mentor/movielens-benchmark", "movielens-benchmark"),
    Case("movielens", "sasrec", "sasrec/movielens-next", "movielens-next"),
    Case("movielens", "bivrec", "bivrec/movielens-next", "movielens-next"),
    Case("movielens", "odmt", "odmt/movielens-next", "movielens-next"),
    Case("graph", "lightgcn", "lightgcn/baby", "graph", (*LARGE, "method.dim=32", "method.layers=2")),
    Case("graph", "bprmf", "bprmf/baby", "graph", LARGE),
]
WORKERS = {"baby": (1, 2, 3), "movielens": (1, 2, 3), "graph": (1, 2)}
RAW = {"baby": "amazon-baby-interactions", "movielens": "ml-latest-small-mm"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the prepared datasets")
    parser.add_argument("--source", type=Path, help="folder of the raw data of Amazon Baby and MovieLens")
    parser.add_argument("--records", type=Path, required=True, help="file of the records, as JSON lines")
    parser.add_argument("--only", nargs="*", default=list(LIMIT), choices=list(LIMIT), metavar="SIZE")
    parser.add_argument("--methods", nargs="*", metavar="METHOD", help="by default all")
    parser.add_argument("--workers", nargs="*", type=int, metavar="N", help="by default 1 to 3, and 1 and 2 for graph")
    parser.add_argument("--again", action="store_true", help="predict again for runs that were measured")
    arguments = parser.parse_args()
    arguments.records.parent.mkdir(parents=True, exist_ok=True)
    for case in CASES:
        if case.size not in arguments.only or (arguments.methods and case.method not in arguments.methods):
            continue
        data = prepared(case, arguments.data, arguments.source)
        for workers in arguments.workers or WORKERS[case.size]:
            record = read(arguments.records).get((case.size, case.method, workers))
            if record is None:
                record = {"size": case.size, "method": case.method, "workers": workers}
                record["measured"] = (measured_steps if case.size == "graph" else measured)(case, data, workers)
                _write(arguments.records, record)
            if "predicted" not in record or arguments.again:
                began = time.perf_counter()
                record |= predicted(case, data, workers)
                record["seconds"] = round(time.perf_counter() - began, 1)
                _write(arguments.records, record)
    records = [record for record in read(arguments.records).values() if "predicted" in record]
    print(table(records), end="")


def _write(lines: Path, record: dict[str, Any]) -> None:
    print(json.dumps(record), flush=True)
    with open(lines, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def prepared(case: Case, folder: Path, source: Path | None) -> str:
    """The folder of a case's dataset, made if it is missing."""
    out = folder / case.data
    if (out / "manifest.json").exists() and (case.data not in RANDOM or _complete(str(out))):
        return str(out)
    if out.exists():  # an interrupted one
        shutil.rmtree(out)
    if case.data == "graph":
        users = NODES * 3 // 4
        write_graph(str(out), GraphSize(users=users, items=NODES - users, edges=EDGES, dim=4, image_dim=4))
        return str(out)
    if source is None:
        raise SystemExit(f"'{out}' does not exist; give --source, the folder of the raw data.")
    raw = source / RAW[case.size]
    command = [sys.executable, "-m", "distrec.cli", "prepare", f"configs/data/{case.data}.yaml"]
    subprocess.run([*command, "--source", str(raw), "--out", str(out)], check=True)
    if case.data in RANDOM:
        add_features(str(out), FEATURES)
    return str(out)


def _complete(out: str) -> bool:
    return FEATURES.keys() <= Dataset.open(out, checked=True).manifest.features.keys()


def _config(case: Case, data: str, workers: int, storage: str) -> tuple[str, list[str]]:
    run = [f"data={data}", f"train.workers={workers}", "train.cpus_per_worker=0.5", f"run.storage={storage}"]
    return f"configs/{case.config}.yaml", [*TWO, *run, "run.name=run", *case.overrides]


def measured(case: Case, data: str, workers: int) -> int:
    """The largest resident memory in bytes of the workers of a real run."""
    with tempfile.TemporaryDirectory() as storage, get_context("spawn").Pool(1) as process:
        return process.apply(_train, _config(case, data, workers, storage))


def measured_steps(case: Case, data: str, workers: int) -> int:
    """The largest resident memory in bytes of the workers of a real run, up to the end of its first epoch's steps."""
    with tempfile.TemporaryDirectory() as storage:
        config, overrides = _config(case, data, workers, storage)
        run = subprocess.Popen([sys.executable, "-m", "distrec.cli", "train", config, *overrides])
        try:
            progress: dict[str, int] = {}
            while progress.get("step", 0) < progress.get("steps", 1):
                time.sleep(0.5)
                if run.poll() is not None:
                    raise RuntimeError(f"the run ended with status {run.returncode}")
                with suppress(OSError, ValueError):
                    progress = json.loads(Path(storage, "run", "progress.json").read_text(encoding="utf-8"))
            family = psutil.Process(run.pid).children(recursive=True)
            found = [process for process in family if "RayTrainWorker" in " ".join(process.cmdline())]
            return max(high_water(process.pid) for process in found)
        finally:
            for process in [*psutil.Process(run.pid).children(recursive=True), run]:
                process.kill()
            run.wait()


def _train(config: str, overrides: list[str]) -> int:
    import distrec

    return int(distrec.train(config, overrides)["peak_memory_bytes"])


def predicted(case: Case, data: str, workers: int) -> dict[str, Any]:
    """What the plan says: the peak, the process alone, and the share of the dataset that was rehearsed."""
    from distrec.config.run import load_run
    from distrec.sizing.plan import plan

    (found,) = plan(load_run(*_config(case, data, workers, "runs")), [workers])
    peak = found.phases["steps"] if case.size == "graph" else found.peak
    return {"predicted": peak, "process": found.phases["process"], "share": found.share}


def read(lines: Path) -> dict[tuple[str, str, int], dict[str, Any]]:
    """The newest record of each case and number of workers."""
    found = {}
    for line in lines.read_text(encoding="utf-8").splitlines() if lines.exists() else []:
        record = json.loads(line)
        found[record["size"], record["method"], record["workers"]] = record
    return found


def table(records: Iterable[dict[str, Any]]) -> str:
    """The records as Markdown, and the largest error of each size."""
    head = ("size", "method", "workers", "predicted MB", "measured MB", "error", "error beyond the process", "share",
            "plan s")  # fmt: skip
    out, worst = [_line(head), _line(["---"] * len(head))], dict.fromkeys(LIMIT, 0.0)
    for record in records:
        known, said, bare = record["measured"], record["predicted"], record["process"]
        error = said / known - 1
        worst[record["size"]] = max(worst[record["size"]], abs(error), key=abs)
        beyond = (said - bare) / (known - bare) - 1
        out.append(
            _line((record["size"], record["method"], record["workers"], f"{said / 1e6:,.0f}", f"{known / 1e6:,.0f}",
                   f"{error:+.1%}", f"{beyond:+.0%}", f"{record['share']:.3g}", record["seconds"]))
        )  # fmt: skip
    out += ["", *(f"{size}: at most {value:.1%} off; the limit is {LIMIT[size]:.0%}" for size, value in worst.items())]
    return "\n".join(out) + "\n"


def _line(cells: Iterable[Any]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    main()
