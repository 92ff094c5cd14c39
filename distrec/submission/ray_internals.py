"""All uses of Ray's internals: what its job client would upload, how much it may be, and the cluster's version.

`tests/submission/test_ray_internals.py` fails if a new version of Ray changes what this module relies on.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def quiet_client() -> None:
    """Hide the log lines of Ray's job client about packing, sending and closed streams; errors remain."""
    import ray.job_submission  # noqa: F401  # its modules set their own levels when they are imported

    for name in (
        "ray._private.runtime_env.packaging", "ray._private.runtime_env.working_dir",
        "ray._private.authentication.http_token_authentication",
        "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk",
    ):  # fmt: skip
        logging.getLogger(name).setLevel(logging.ERROR)


def most_bytes() -> int:
    """The largest package of a working directory, in bytes.

    Ray documents the limit of the message that stores the package on the head, which must stay below 512 MiB. The
    dashboard, through which the package is sent, does not read requests that large.
    """
    from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE
    from ray._private.runtime_env.packaging import GCS_STORAGE_MAX_SIZE

    return int(min(DASHBOARD_CLIENT_MAX_SIZE, GCS_STORAGE_MAX_SIZE - 1))


def packed(folder: Path, excludes: Sequence[str], left_out: Callable[[Path], bool]) -> list[Path]:
    """The files and empty folders that Ray would put into the package of a working directory.

    Ray's own walk, with its rules: `.gitignore` (unless RAY_RUNTIME_ENV_IGNORE_GITIGNORE=1) and `.rayignore` in every
    folder, Ray's default excludes, and `excludes`.

    Args:
        folder: the working directory, absolute.
        excludes: patterns as in a `.gitignore` of `folder`.
        left_out: called with every path that `excludes` keep; what it returns True for is not looked into.
    """
    from ray._private.ray_constants import RAY_RUNTIME_ENV_IGNORE_GITIGNORE, get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import _dir_travel, _get_excludes

    found = []

    def take(path: Path) -> None:
        if path.is_file() or (path.is_dir() and next(path.iterdir(), None) is None):
            found.append(path)

    by_name = _get_excludes(folder, [*get_runtime_env_default_excludes(), *excludes])
    ignored = os.environ.get(RAY_RUNTIME_ENV_IGNORE_GITIGNORE, "0") != "1"
    _dir_travel(folder, [by_name, left_out], take, include_gitignore=ignored)
    return found


def cluster_version(client: Any) -> str:
    """The version of Ray that answered a `JobSubmissionClient`; its public `get_version` is that of the protocol."""
    return str(client._server_ray_version)
