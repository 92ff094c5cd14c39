"""What faults do to a run on several hosts: a table of detection, next step, lost rows and end state.

    python -m benchmarks.faults --records build/faults.jsonl

Needs root and iproute2. Every fault meets `--repeat` runs; each run adds one line to the file of records, and the same
command goes on after the last of them. The table of all records, with medians, is printed at the end. A run takes about
two minutes on two idle cores.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import traceback
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.lab.faults import BY_NAME, FAULTS, Undisturbed, meet
from tests.lab.hosts import Lab, lack
from tests.lab.site import encode, start

_RAYS_OWN = ("(raylet)", "\t", " ")  # how lines of Ray itself begin in a job's log
COLUMNS = ("detected", "started", "next_step", "next_checkpoint", "resubmitted")


def main() -> None:
    parser = argparse.ArgumentParser(description="Faults on several hosts made of network namespaces.")
    parser.add_argument("--records", type=Path, required=True, help="file of the records, as JSON lines")
    parser.add_argument("--repeat", type=int, default=3, help="runs that each fault meets")
    parser.add_argument("--only", nargs="*", default=list(BY_NAME), choices=list(BY_NAME), metavar="FAULT")
    parser.add_argument("--limit", type=float, default=300, help="seconds that a job may take after its fault")
    arguments = parser.parse_args()
    if missing := lack():
        sys.exit(missing)
    arguments.records.parent.mkdir(parents=True, exist_ok=True)
    measure(arguments.records, arguments.only, arguments.repeat, arguments.limit)
    print(table(read(arguments.records)), end="")


def measure(lines: Path, only: list[str], repeat: int, limit: float) -> None:
    """Append the records that `lines` lacks."""
    with tempfile.TemporaryDirectory() as folder, Lab(Path(folder) / "lab") as lab:
        cluster = start(lab)
        encode(cluster)
        undisturbed = Undisturbed(cluster, Path(folder))
        for number in range(repeat):
            for name in only:
                if len(read(lines)[name]) > number:
                    continue
                fault = BY_NAME[name]
                if missing := fault.lacks(cluster):
                    print(f"{name}: left out, {missing}", flush=True)
                    continue
                run = f"{name}-{number}"
                try:
                    record = meet(cluster, fault, undisturbed, Path(folder) / run, run, limit)
                except (AssertionError, TimeoutError, RuntimeError):
                    print(f"{name}: {traceback.format_exc()}", flush=True)
                    continue
                print(record.json(), flush=True)
                with open(lines, "a") as file:
                    file.write(record.json() + "\n")


def read(lines: Path) -> dict[str, list[dict[str, Any]]]:
    """The records by fault."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in lines.read_text().splitlines() if lines.exists() else []:
        record = json.loads(line)
        found[record["fault"]].append(record)
    return found


def table(records: dict[str, list[dict[str, Any]]]) -> str:
    """The records as Markdown: medians of times, and every value of the rest."""
    head = ("fault", "runs", "outcome", "detected s", "new workers s", "next step s", "of this start-up s",
            "next checkpoint s", "same command to step s", "rows lost, doubled", "end state",
            "what the log says first")  # fmt: skip
    out = [_line(head), _line(["---"] * len(head))]
    for fault in FAULTS:
        if not (mine := records.get(fault.name)):
            continue
        times = {name: _median([record[name] for record in mine]) for name in COLUMNS}
        startup = _median([sum(phases.values()) if (phases := _phases(record)) else None for record in mine])
        outcome = "; ".join(sorted({", then ".join(record["outcome"]) for record in mine}))
        rows = "; ".join(sorted({f"{_rows(record, 'lost')}, {_rows(record, 'duplicated')}" for record in mine}))
        state = "; ".join(sorted({record["state"] for record in mine}))
        said = [line for line in mine[0]["saw"] if not line.startswith(_RAYS_OWN)]
        saw = (said or ["nothing"])[0].replace("|", "\\|")
        out.append(
            _line((fault.what, len(mine), outcome, times["detected"], times["started"], times["next_step"], startup,
                   times["next_checkpoint"], times["resubmitted"], rows, state, saw))
        )  # fmt: skip
    every = [phases for mine in records.values() for record in mine if (phases := _phases(record))]
    if not every:
        return "\n".join(out) + "\n"
    names = dict.fromkeys(name for phases in every for name in phases)
    out += ["", f"Start-up of {len(every)} restarts, by phase, in seconds:", ""]
    out += [_line(names), _line(["---"] * len(names))]
    out += [_line([_median([phases.get(name) for phases in every]) for name in names])]
    return "\n".join(out) + "\n"


def _line(cells: Iterable[Any]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _phases(record: dict[str, Any]) -> dict[str, float]:
    """The seconds of each phase of the first restart."""
    return dict(record["restarts"][0].get("seconds", {})) if record["restarts"] else {}


def _median(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.median(known):.1f}" if known else "-"


def _rows(record: dict[str, Any], name: str) -> str:
    rows = record["rows"]
    if not rows:
        return "?"
    return str(rows[name] if name == "duplicated" else rows["lost"] + max(0, rows["expected"] - rows["trained"]))


if __name__ == "__main__":
    main()
