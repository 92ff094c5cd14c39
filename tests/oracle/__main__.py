"""`python -m tests.oracle METHOD FILE.npz [--workers N] [--zero S]`: exits with 0 if every key is within tolerance."""

from __future__ import annotations

import argparse
import sys

from tests.oracle.compare import table
from tests.oracle.replay import METHODS, run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.oracle", description=__doc__)
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("fixture", help="an .npz file of the published program's numbers")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--zero", type=int, default=0, choices=range(4))
    arguments = parser.parse_args()
    rows = run(arguments.method, arguments.fixture, arguments.workers, arguments.zero)
    print(f"{arguments.method}: {arguments.fixture}, workers {arguments.workers}, ZeRO {arguments.zero}")
    print(table(rows))
    return 0 if all(row.holds for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
