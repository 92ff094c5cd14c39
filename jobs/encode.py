"""`distrec encode` as a Ray job: `ray job submit --working-dir . -- python jobs/encode.py ARGUMENTS`."""

import sys

from distrec.cli import main

raise SystemExit(main(["encode", *sys.argv[1:]]))
