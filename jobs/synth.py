"""`distrec synth` as a Ray job: `ray job submit --working-dir . -- python jobs/synth.py ARGUMENTS`."""

import sys

from distrec.cli import main

raise SystemExit(main(["synth", *sys.argv[1:]]))
