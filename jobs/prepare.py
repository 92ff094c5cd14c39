"""`distrec prepare` as a Ray job: `ray job submit --working-dir . -- python jobs/prepare.py ARGUMENTS`."""

import sys

from distrec.cli import main

raise SystemExit(main(["prepare", *sys.argv[1:]]))
