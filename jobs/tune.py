"""`distrec tune` as a Ray job: `ray job submit --working-dir . -- python jobs/tune.py ARGUMENTS`."""

import sys

from distrec.cli import main

raise SystemExit(main(["tune", *sys.argv[1:]]))
