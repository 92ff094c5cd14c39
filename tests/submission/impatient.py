"""Follow a job as `distrec submit` does, but with little patience: `python -m tests.submission.impatient URL JOB`."""

import sys

from distrec.submission import cluster
from distrec.submission.follow import Follower

cluster._ANSWER = 3.0
sys.exit(Follower(cluster.Cluster(sys.argv[1]), sys.argv[2], patience=8, silence=1).follow())
