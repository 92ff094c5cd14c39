"""Whether a Ray cluster has the CPUs that a verb asks for, and waiting until it has.

Clusters that Kubernetes starts for a job, and those that grow by themselves, have no CPUs at first. Lost hosts may come
back. So what a cluster cannot do now is waited for, and only what it can never do is refused at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from distrec.errors import InputError

LOOK, SAY, SETTLE = 1.0, 60.0, 8.0
"""Seconds between looks at the cluster, between lines about waiting, and without a change before fewer workers than
wanted start."""


@dataclass(frozen=True)
class Ask:
    """CPUs that belong together on one host, several times.

    Attributes:
        least: how often they are needed at least.
        most: how often they are wanted.
        cpus: CPUs of each.
        key: the setting that asks for them, for messages, such as "key 'train.workers' is 3".
        remedy: how to ask for less, for messages.
    """

    least: int
    most: int
    cpus: float
    key: str
    remedy: str


@dataclass(frozen=True)
class Offer:
    """What a cluster has now.

    Attributes:
        free: CPUs that nobody has reserved, of each host that stays.
        total: CPUs of each of these hosts.
        types: CPUs of each kind of host that an autoscaler may start; None without an autoscaler.
        fixed: whether no other host can join.
    """

    free: Sequence[float]
    total: Sequence[float]
    types: Sequence[float] | None
    fixed: bool


def fitting(cpus: float, hosts: Sequence[float]) -> int:
    """How many times `cpus` CPUs fit on hosts that have the given CPUs, if each time all of them are on one host."""
    return sum(int(have / cpus + 1e-9) for have in hosts)


def never(ask: Ask, offer: Offer) -> str | None:
    """Why a cluster can never do what is asked; None if it can, or if it may when hosts join or other jobs end."""
    asked = f"{ask.key}, which is {ask.least * ask.cpus:g} CPUs"
    if offer.fixed and fitting(ask.cpus, offer.total) < ask.least:
        return f"{asked}, but the cluster offers {sum(offer.total):g}; {ask.remedy} or add nodes."
    hosts = [cpus for cpus in (*offer.total, *(offer.types or ())) if cpus > 0]
    if hosts and max(hosts) < ask.cpus:
        return (
            f"{asked}, {ask.cpus:g} of them on one host, but the largest host of the cluster has {max(hosts):g}; "
            f"{ask.remedy}."
        )
    return None


def current_offer(fixed: bool = False) -> Offer:
    """What the connected cluster has now. Hosts that will be taken away count as gone.

    Args:
        fixed: whether no other host can join.
    """
    import ray

    from distrec.cluster.ray_internals import draining_nodes, free_cpus, node_types

    leaving, free = draining_nodes(), free_cpus()
    stay = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in leaving]
    return Offer(
        free=[free.get(node["NodeID"], 0.0) for node in stay],
        total=[float(node["Resources"].get("CPU", 0)) for node in stay],
        types=node_types(),
        fixed=fixed,
    )


def wait_for(
    ask: Ask,
    limit: float,
    fixed: bool = False,
    say: Callable[[str], None] = print,
    stop: Callable[[], bool] = lambda: False,
) -> int:
    """Wait until the connected cluster has free CPUs for what is asked, and return how often they are there.

    If there are enough for `ask.least` but not for `ask.most`, hosts may just be joining: it waits until nothing has
    changed for some seconds.

    Args:
        ask: the CPUs.
        limit: the seconds to wait at most.
        fixed: whether no other host can join.
        say: prints a line about the wait.
        stop: whether to stop waiting; looked at about once per second.

    Returns:
        A number from `ask.least` to `ask.most`; 0 if `stop` said so.

    Raises:
        InputError: the cluster can never do it, or could not within `limit`.
    """
    import ray

    began, said, changed, before, demand = time.monotonic(), None, time.monotonic(), -1, None
    try:
        while not stop():
            offer, now = current_offer(fixed), time.monotonic()
            if (reason := never(ask, offer)) is not None:
                raise InputError(reason)
            fits = min(fitting(ask.cpus, offer.free), ask.most)
            if demand is not None and demand.wait(0):
                return ask.most
            if fits != before:
                before, changed = fits, now
            if fits == ask.most or (fits >= ask.least and now - changed >= SETTLE):
                return fits
            if now - began >= limit and fits < ask.least:
                raise InputError(
                    f"{ask.key}, but after {_duration(limit)} the cluster still has room for {fits} of {ask.least} "
                    f"({_words(offer)}); {ask.remedy}, or add nodes and give the same command again."
                )
            if fits < ask.least and (said is None or now - said >= SAY):
                said = now
                say(
                    f"waiting for the cluster: {ask.key}, and it has room for {fits} of {ask.least} ({_words(offer)}); "
                    f"for up to {_duration(limit - (now - began))}"
                )
            if demand is None and not fixed:  # an autoscaler starts hosts for what is asked and not yet there
                demand = ray.util.placement_group([{"CPU": ask.cpus}] * ask.most)
            time.sleep(LOOK)
        return 0
    finally:
        if demand is not None:
            ray.util.remove_placement_group(demand)


def _words(offer: Offer) -> str:
    hosts = [cpus for cpus in offer.total if cpus > 0]
    many = "host" if len(hosts) == 1 else "hosts"
    return f"{len(hosts)} {many} with {sum(hosts):g} CPUs, {sum(offer.free):g} of them free"


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{max(seconds, 0):.0f} s"
