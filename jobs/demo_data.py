"""`distrec demo-data` as a Ray job: `ray job submit --working-dir . -- python jobs/demo_data.py ARGUMENTS`."""

import sys

from distrec.cli import main

raise SystemExit(main(["demo-data", *sys.argv[1:]]))
