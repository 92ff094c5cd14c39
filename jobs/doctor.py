"""`distrec doctor` as a Ray job: the script that `distrec submit` runs."""

import sys

from distrec.cli import main

raise SystemExit(main(["doctor", *sys.argv[1:]]))
