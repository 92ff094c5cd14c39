"""`distrec submit VERB …`: check everything here, send the working directory, start the job, and follow it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from distrec.errors import DONE
from distrec.runtime import quiet
from distrec.submission.cluster import Cluster, choose_address
from distrec.submission.environment import travelling
from distrec.submission.follow import Follower, how_to
from distrec.submission.job import Job
from distrec.submission.upload import Upload


def submit(
    parsed: argparse.Namespace,
    arguments: Sequence[str],
    address: str | None = None,
    variables: Sequence[str] = (),
    wait: bool = True,
) -> int:
    """Run a verb as a job of a Ray cluster, with the current folder as its working directory.

    Args:
        parsed: the verb's arguments, as its own parser reads them.
        arguments: the same as they were given, without the verb.
        address: URL of the cluster's dashboard; by default that of the environment.
        variables: environment variables of the job as `NAME=VALUE`, besides those that travel by themselves.
        wait: follow the job to its end.

    Returns:
        The exit status: the job's own, or 0 without `wait`, or 130 if the job was left or stopped.

    Raises:
        InputError: something would not work on the cluster; nothing was submitted.
    """
    quiet()
    server = choose_address(address, os.environ)
    environment = travelling(os.environ, variables)
    job = Job.of(parsed, arguments, os.environ)
    notes = job.check_places()
    upload = Upload.of(Path.cwd())
    job.check_files(upload)
    upload.require_size()
    cluster = Cluster(server)
    for line in [upload.told(), *notes]:
        print(line, flush=True)
    name = cluster.submit(
        job.name,
        entrypoint=job.entrypoint,
        runtime_env={"working_dir": str(upload.folder), "excludes": upload.excludes, "env_vars": environment},
    )
    print(f"submitted '{name}' to {server}", flush=True)
    if not wait:
        print(how_to(server, name))
        return DONE
    return Follower(cluster, name).follow()
