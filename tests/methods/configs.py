"""Run configs made in a test."""

from __future__ import annotations

from typing import Any

from distrec.config import RunConfig, decode


def run(method: dict[str, Any], **sections: Any) -> RunConfig:
    """A run config of this method, not yet resolved; `sections` are the others."""
    return decode(RunConfig, {"data": "d", "run": {"name": "r"}, "method": method, **sections})
