"""`distrec check` as a Ray job: `ray job submit --working-dir . -- python jobs/check.py ARGUMENTS`."""

import sys

from distrec.cli import main

raise SystemExit(main(["check", *sys.argv[1:]]))
