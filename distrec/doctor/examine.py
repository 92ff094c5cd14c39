"""`distrec doctor`: runs all checks, and shows what they found."""

from __future__ import annotations

import json
import os
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from distrec.config.run import RunConfig, load_run
from distrec.doctor import cluster, host, storage
from distrec.doctor.finding import Finding, failed
from distrec.errors import DONE, FAILED, InputError
from distrec.submission.cluster import ADDRESS, RAY_ADDRESS, choose_address
from distrec.submission.environment import has_credentials

_WIDTH = 120  # columns of the table
_USER = re.compile(r"//[^/@\s]*@")  # of a URL, perhaps with a password


def doctor(
    config: str | Path | None = None,
    overrides: Sequence[str] = (),
    *,
    place: str | None = None,
    address: str | None = None,
    as_json: bool = False,
) -> int:
    """Examine this machine, a run's storage and a cluster, and print what was found.

    Args:
        config: path of the config of a run that is to be trained.
        overrides: `dotted.key=value` settings, applied to it.
        place: storage to examine in place of the config's `run.storage`.
        address: URL of the dashboard of a cluster; by default that of the environment.
        as_json: print JSON in place of a table.

    Returns:
        The exit status: 0 if no check failed, otherwise 1.

    Raises:
        InputError: the config, the storage or the address is none.
    """
    findings = examine(config, overrides, place=place, address=address)
    print(as_text(findings) if not as_json else json.dumps(as_tree(findings), indent=2))
    return FAILED if any(found.state == "failed" for found in findings) else DONE


def examine(
    config: str | Path | None = None,
    overrides: Sequence[str] = (),
    *,
    place: str | None = None,
    address: str | None = None,
    environment: Mapping[str, str] = os.environ,
) -> list[Finding]:
    """What all checks found; arguments and errors as in `doctor`.

    Args:
        environment: variables of this process.
    """
    run = None if config is None else load_run(config, overrides)
    place = place if place is not None else run.run.storage if run else None
    if place is not None and has_credentials(place):
        raise InputError("the storage holds credentials, which others can read; give them in AWS_… variables.")
    url = _dashboard(address, environment)
    clustered = url is not None or bool(environment.get(RAY_ADDRESS))
    probe = None if place is None else storage.probe(place)
    asked = None if url is None else cluster.ask(url)
    head = cluster.head_port(environment)
    checks: list[tuple[str, Callable[[], Finding | list[Finding]]]] = [
        ("packages", host.packages),
        ("lock file", host.lock_file),
        ("extension locks", lambda: host.extension_locks(environment)),
        ("memory", lambda: host.memory(run, clustered)),
        ("shared memory", host.shared_memory),
        ("threads", lambda: host.threads(run, clustered, environment)),
        ("open files", host.open_files),
        ("interfaces", lambda: host.interfaces(clustered, environment)),
        ("Ray's disk", lambda: host.ray_disk(environment)),
        ("storage", lambda: storage.writable(probe)),
        ("storage's clock", lambda: storage.clock(probe)),
        ("room for checkpoints", lambda: storage.room(place, _needed(run))),
        ("dashboard", lambda: cluster.dashboard(asked)),
        ("head's clock", lambda: cluster.clock(asked)),
        ("jobs", lambda: cluster.jobs(asked)),
        ("head", lambda: head),
        ("hosts", lambda: cluster.hosts(head)),
    ]
    return [found for name, check in checks for found in _done(name, check)]


def _done(name: str, check: Callable[[], Finding | list[Finding]]) -> list[Finding]:
    """What a check found, without credentials. One that breaks must not hide what the others found."""
    try:
        found = check()
    except Exception as error:
        told = f"{type(error).__name__}: {error}".splitlines()[0]
        found = failed(name, f"could not be examined ({told})", "examine it by hand, and report this as a fault")
    return [replace(one, found=_USER.sub("//", one.found)) for one in (found if isinstance(found, list) else [found])]


def _dashboard(address: str | None, environment: Mapping[str, str]) -> str | None:
    """The address of the dashboard to ask; None if none is named."""
    named = address is not None or environment.get(ADDRESS) or "://" in environment.get(RAY_ADDRESS, "")
    return choose_address(address, environment) if named else None


def _needed(run: RunConfig | None) -> int | None:
    """Bytes of the checkpoints that a run keeps; None if its data cannot be opened, which `train` says."""
    if run is None:
        return None
    from distrec.data.dataset import Dataset
    from distrec.methods.registry import build_method, resolve
    from distrec.training.size import MOST_CHECKPOINTS, checkpoint_bytes

    try:
        run = resolve(run)
        data = Dataset.open(run.data)
        return MOST_CHECKPOINTS * checkpoint_bytes(run, data, build_method(run, data))
    except InputError:
        return None


def as_tree(findings: Sequence[Finding]) -> dict[str, Any]:
    """What `--json` prints: `checks`, each with name, state, found and remedy (null unless it failed), and `failed`."""
    return {"checks": [vars(found) for found in findings], "failed": _failed(findings)}


def as_text(findings: Sequence[Finding]) -> str:
    """A table: a line per check, with the remedy below if it failed."""
    states, names = (max(len(getattr(found, key)) for found in findings) for key in ("state", "name"))
    lines, indent = [], " " * (states + names + 4)
    for found in findings:
        start = f"{found.state:<{states}}  {found.name:<{names}}  "
        lines.append(start + found.found)
        if found.remedy is not None:
            lines += textwrap.wrap(f"remedy: {found.remedy}", _WIDTH, initial_indent=indent, subsequent_indent=indent)
    told = _failed(findings)
    passed = sum(found.state == "passed" for found in findings)
    return "\n".join([*lines, f"{told} failed, {passed} passed, {len(findings) - told - passed} not applicable"])


def _failed(findings: Sequence[Finding]) -> int:
    return sum(found.state == "failed" for found in findings)
