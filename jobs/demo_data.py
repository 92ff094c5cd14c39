"""`distrec demo-data` as a Ray job: the script that `distrec submit` runs."""

import sys

from distrec.cli import main

raise SystemExit(main(["demo-data", *sys.argv[1:]]))
