"""The fenced blocks of the documents: the commands that readers run, and the files that they write."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# The order matters: the first page makes the demo data that the others use.
PAGES = ["docs/usage.md", "README.md", *sorted(
    str(path.relative_to(ROOT)) for path in [ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    if path.name != "usage.md"
)]  # fmt: skip
_FENCE = re.compile(r"^```([a-z]*)([^\n]*)\n(.*?)^```[ ]*$", re.MULTILINE | re.DOTALL)
_NAMED = re.compile(r"# (\S+\.(?:yaml|py|json))\n")


@dataclass(frozen=True)
class Block:
    """A fenced block: its first line's number, its language, the words after the language, and its text."""

    line: int
    language: str
    words: tuple[str, ...]
    text: str

    @property
    def file(self) -> str | None:
        """The path of the file whose whole content the block is; None if it names no file."""
        found = _NAMED.match(self.text)
        return found[1] if found else None

    @property
    def runs(self) -> bool:
        """Whether the block can run offline. If it cannot, the page says why."""
        return self.language in ("bash", "python") and "not-run" not in self.words


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a Markdown page, in order."""
    return [
        Block(text.count("\n", 0, found.start()) + 1, found[1], tuple(found[2].split()), found[3])
        for found in _FENCE.finditer(text)
    ]
