"""Typed configuration: one tree, YAML plus dotted overrides, every error names the key."""

from distrec.config.printed import commented
from distrec.config.run import RunConfig, digest, load_run
from distrec.config.tree import Section, apply_overrides, decode, load_file, nearest

__all__ = [
    "RunConfig",
    "Section",
    "apply_overrides",
    "commented",
    "decode",
    "digest",
    "load_file",
    "load_run",
    "nearest",
]
