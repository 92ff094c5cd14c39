"""What `distrec/submission/ray_internals.py` relies on is still so in the installed version of Ray."""

from __future__ import annotations

import logging
from pathlib import Path

from distrec.submission.ray_internals import most_bytes, packed, quiet_client


def test_the_limit_is_that_of_the_dashboard() -> None:
    """`tests/submission/test_submit.py` sends so much to a dashboard."""
    assert most_bytes() == 100 * 2**20


def test_the_walk_obeys_patterns_ignore_files_and_the_callback(tmp_path: Path) -> None:
    for name in ("keep/a", "keep/b.tmp", "cut/x", "marked/x", ".git/x", "ignored/x", "heavy/x"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / ".gitignore").write_text("ignored\n")
    (tmp_path / ".rayignore").write_text("heavy\n")
    asked = []

    def left_out(path: Path) -> bool:
        asked.append(path)
        return path.name == "marked"

    found = packed(tmp_path, ["*.tmp", "/cut"], left_out)
    assert {path.relative_to(tmp_path).as_posix() for path in found} == {"keep/a", "empty", ".gitignore", ".rayignore"}
    assert tmp_path / "cut" not in asked  # patterns come first
    assert tmp_path / "marked/x" not in asked


def test_messages_of_the_client_are_silenced_but_errors_remain() -> None:
    quiet_client()
    for name in ("ray._private.runtime_env.packaging", "ray.dashboard.modules.dashboard_sdk"):
        assert name in logging.Logger.manager.loggerDict
        assert not logging.getLogger(name).isEnabledFor(logging.WARNING)
        assert logging.getLogger(name).isEnabledFor(logging.ERROR)
