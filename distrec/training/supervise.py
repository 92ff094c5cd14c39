"""Runs work on Ray Train workers and starts them again when some are lost, in other numbers if need be.

Ray Train's own restarts are off, because the decision needs what only a run knows: whether an epoch was finished since
the last failure, whether the workers were asked to end, for how many of them the cluster has room. The decisions are in
`distrec.training.policy`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from distrec.cluster.capacity import Ask, wait_for
from distrec.config.run import RunConfig
from distrec.errors import Interrupted, shown
from distrec.training.group import Group
from distrec.training.journal import Journal
from distrec.training.policy import Failures, decide


class Supervisor:
    """Runs work on the connected cluster until it is done.

    Args:
        config: the run config.
        journal: what is told about the work.
        fixed: whether no other host can join the cluster.
    """

    def __init__(self, config: RunConfig, journal: Journal, fixed: bool):
        train = config.train
        self._config, self._journal, self._fixed = config, journal, fixed
        self._ask = Ask(
            train.least_workers, train.most_workers, train.cpus_per_worker,
            f"key 'train.workers' is {shown(train.workers)} with 'train.cpus_per_worker' {train.cpus_per_worker:g}",
            "lower one of them",
        )  # fmt: skip

    def room(self) -> int:
        """Wait for the cluster; return how many workers it has room for.

        Raises:
            InputError: it can never have enough, or did not have it in time.
            Interrupted: the user stopped the run meanwhile.
        """
        limit = self._config.train.wait_for_cluster
        workers = wait_for(self._ask, limit, self._fixed, self._journal.say, self._journal.stopping)
        if not workers:
            raise Interrupted("stopped while it waited for the cluster; the same command continues.")
        return workers

    def run(self, workers: int, work: str, arguments: Mapping[str, Any]) -> None:
        """Run work, first on `workers` workers, until it is done.

        Args:
            workers: a number that `room` returned.
            work: the function that every worker calls with the config, as "module:name".
            arguments: its further arguments.

        Raises:
            BaseException: what the work raised, if a restart would not help or is not allowed.
        """
        failures = Failures()
        while True:
            end = Group(self._config, self._ask, self._journal, self._fixed, workers).run(work, arguments)
            ended = time.monotonic()
            decision = decide(end, failures, self._config.train.max_failures)
            failures = decision.failures
            if decision.action != "again":
                self._journal.ended()
            if decision.error is not None:
                raise decision.error
            if decision.action == "finish":
                return
            self._journal.say(f"{decision.why}; starting again from the newest checkpoint")
            self._journal.clear_request()
            workers = self.room()
            self._journal.restarting(decision.why, workers, time.monotonic() - ended)
