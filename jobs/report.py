"""`distrec report` as a Ray job: `ray job submit --working-dir . -- python jobs/report.py ARGUMENTS`."""

import sys

from distrec.cli import main

raise SystemExit(main(["report", *sys.argv[1:]]))
