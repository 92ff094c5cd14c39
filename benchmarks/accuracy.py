"""Accuracy over seeds: trains run configs, evaluates the test split, and prints means and spreads as a Markdown table.

    python benchmarks/accuracy.py configs/lightgcn/baby.yaml … --seeds 1 2 3 --storage runs/accuracy

Every run is an ordinary run in its own process, and is continued if it exists already. Epochs are chosen on the
validation split.
"""

from __future__ import annotations

import argparse
import statistics
from multiprocessing import get_context
from pathlib import Path
from typing import Any

METRICS = ("recall@10", "recall@20", "ndcg@10", "ndcg@20")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--storage", default="runs/accuracy")
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value", help="overrides for every run")
    arguments = parser.parse_args()
    rows = []
    for config in arguments.configs:
        name = "-".join(Path(config).with_suffix("").parts[-2:])
        summaries, cold = [], []
        for seed in arguments.seeds:
            run = f"{name}-seed{seed}"
            fixed = [f"run.name={run}", f"run.storage={arguments.storage}", f"train.seed={seed}", "train.workers=0"]
            with get_context("spawn").Pool(1) as process:
                summary, slices = process.apply(
                    trained, (config, [*fixed, *arguments.set], f"{arguments.storage}/{run}")
                )
            summaries.append(summary)
            cold.append(slices["items.cold"]["metrics"])
        cells = [_spread([summary["test"][metric] for summary in summaries]) for metric in METRICS]
        cells.append(_spread([metrics["recall@20"] for metrics in cold if metrics]))
        cells.append(" ".join(str(summary["best_epoch"] or "-") for summary in summaries))
        cells.append(_spread([summary["seconds_per_epoch"] or 0 for summary in summaries], 2))
        cells.append(f"{max(summary['peak_memory_bytes'] for summary in summaries) / 2**20:,.0f}")
        rows.append([name, *cells])
    header = ["config", *METRICS, "recall@20, cold items", "best epochs", "s per epoch", "peak MiB"]
    print()
    for row in [header, ["---"] * len(header), *rows]:
        print("| " + " | ".join(row) + " |")


def trained(config: str, overrides: list[str], run: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The summary of a run, and the slices of its evaluation."""
    import distrec
    from distrec.training.evaluate import evaluate

    return distrec.train(config, overrides), evaluate(run)["slices"]


def _spread(values: list[float], digits: int = 4) -> str:
    if not values:
        return "-"
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


if __name__ == "__main__":
    main()
