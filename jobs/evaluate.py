"""`distrec evaluate` as a Ray job: `ray job submit --working-dir . -- python jobs/evaluate.py ARGUMENTS`."""

import sys

from distrec.cli import main

raise SystemExit(main(["evaluate", *sys.argv[1:]]))
