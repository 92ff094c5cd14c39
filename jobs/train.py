"""`distrec train` as a Ray job: `ray job submit --working-dir . -- python jobs/train.py ARGUMENTS`."""

import sys

from distrec.cli import main

raise SystemExit(main(["train", *sys.argv[1:]]))
