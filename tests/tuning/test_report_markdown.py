"""Text from the data is only text in `report.md`: read back by a Markdown parser, it is what it was."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token

from distrec.data.storage import Folder
from distrec.tuning.report import report
from distrec.tuning.report.gather import gather
from distrec.tuning.report.markdown import code, escaped, table
from distrec.tuning.report.pictures import read_items
from distrec.tuning.report.sections import Section, sections
from distrec.tuning.report.words import SETTINGS
from tests.tuning.planted_sweeps import TWO, plant, plant_data

PARSER = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
NASTY = (
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<!-- comment",
    "<https://example.org>",
    "&lt;b&gt;",
    "[click](javascript:alert(1))",
    "![picture](https://example.org/x.png)",
    "[a]: javascript:alert(1)",
    "[x][y]",
    "javascript:alert(1)",
    "https://example.org and www.example.org",
    "bob.b+c@mail.example.com, a@b@c.d",
    "a | b || c \\| d",
    "line\nbreak\r\n\ttab\x00\x1b[31m",
    "`code` and ``more` `",
    "run `<b>` now",
    "**bold** __bold__ *em* _em_ a_b_c __init__",
    "~~gone~~ $x^2$",
    "# heading",
    "- item",
    "+ item",
    "1. item",
    "12) item",
    "===",
    "---",
    "> quote",
    "\\",
    "ends with \\",
    "```",
    "| a |\n| --- |",
    "a *b",
    "*",
    "_",
    "`",
    "    indented",
    "&copy; &#60;",
    "]( ](x",
    "<a href='javascript:x'>",
    "[^1] [ ] [x]",
)


def plain(text: str) -> str:
    """`text` with each run of white space and control characters as one space."""
    return re.sub(r"[\s\x00-\x1f\x7f-\x9f]+", " ", text).strip()


def words(token: Token, markup: set[str]) -> str:
    """What a reader sees of an inline token, which may contain no other markup than `markup`.

    That is without the spaces of no width that we put into mail addresses.
    """
    children = token.children or []
    assert {child.type for child in children} <= {"text", *markup}, token.content
    return "".join(child.content for child in children).replace("@\u200b", "@")


def inline(source: str, markup: set[str]) -> list[str]:
    return [words(token, markup) for token in PARSER.parse(source) if token.type == "inline"]


@pytest.mark.parametrize("text", NASTY)
def test_text_is_shown_as_it_is(text: str) -> None:
    bold = {"strong_open", "strong_close"}
    assert inline(f"# Sweep {escaped(text)}", set()) == [f"Sweep {plain(text)}"]
    assert inline(f"User {escaped(text)}", set()) == [f"User {plain(text)}"]
    assert inline(f"a {code(text)} z", {"code_inline"}) == [f"a {plain(text)} z"]
    lines = table(["", "items"], [[escaped(text), code(text)], [escaped(text), f"**{escaped(text)}**; x"]])
    assert inline("\n".join(lines), {"code_inline", *bold}) == [
        "", "items", plain(text), plain(text), plain(text), f"{plain(text)}; x",
    ]  # fmt: skip
    lines = table(["a"], [[escaped(text)], ["x"]], [True, False])
    assert inline("\n".join(lines), bold) == ["a", plain(text), "x"]


@pytest.mark.parametrize("seed", range(6))
def test_any_text_is_shown_as_it_is(seed: int) -> None:
    rng = np.random.default_rng(seed)
    parts = [*"`*_<>[]()!|\\#&~$:-+=.@1a \n", "javascript:", "https://a.b", "<b>", "](", "&lt;", "**", "é", "_x_"]
    for _ in range(50):
        text = "".join(rng.choice(parts, rng.integers(1, 25))) + "1"
        test_text_is_shown_as_it_is(text)
        assert "<" not in escaped(text)
        assert not re.search(r"[a-z]:\S|\]\(", escaped(text))


def test_only_mail_addresses_are_broken() -> None:
    """GitHub makes links of them, whether or not their @ is an entity."""
    assert escaped("ask bob@example.com") == "ask bob@&#8203;example.com"
    assert escaped("recall@20 and ndcg@5. @home a@ @") == "recall@20 and ndcg@5. @home a@ @"


def spoil(value: Any, keys: tuple[str, ...], nasty: Iterator[str]) -> Any:
    """A copy of a JSON value whose strings under any of `keys` are replaced."""
    if isinstance(value, dict):
        return {
            key: next(nasty) if key in keys and isinstance(part, str | None) else spoil(part, keys, nasty)
            for key, part in value.items()
        }
    return [spoil(part, keys, nasty) for part in value] if isinstance(value, list) else value


def spoiled_sweep(folder: Folder, nasty: Iterator[str]) -> None:
    """Put nasty texts wherever a sweep folder has text that is no key."""

    def change(*parts: str, keys: tuple[str, ...], also: Callable[[Any], None] = lambda tree: None) -> None:
        tree = spoil(folder.read_json(*parts), keys, nasty)
        also(tree)
        folder.write_json(tree, *parts)

    settings = yaml.safe_load(folder.read_bytes("sweep.yaml"))
    settings["run"]["name"] = next(nasty)
    folder.write_bytes(yaml.safe_dump(settings).encode(), "sweep.yaml")
    keys = ("name", "split", "title", "python", "torch", "source", "note", "started")
    change("sweep.json", keys=keys, also=lambda tree: tree["versions"].update({next(nasty): next(nasty)}))
    for kind in ("trials", "final"):
        for name in folder.names(kind):
            change(
                kind, name, "trial.json", keys=("reason", "optimizer.lr"),
                also=lambda tree: tree["values"].update({next(nasty): next(nasty)}),
            )  # fmt: skip
            change(
                kind, name, "run.json", keys=("started",), also=lambda tree: tree["degradations"].append(next(nasty))
            )
    for name in folder.names("final"):
        change("final", name, "evaluation", "test.json", keys=("meaning",))
        change("final", name, "evaluation", "test-examples.json", keys=("id", "title"))


def tables_of(shown: list[Section]) -> list[list[str]]:
    """The cells of all tables of text, in the order of the report."""
    out = []
    for section in shown:
        out += [[cell for row in (table.head, *table.rows) for cell in row] for table in section.tables]
        out += tables_of(section.sections)
    return out


@pytest.mark.parametrize("start", [0, 18])
def test_a_report_on_nasty_data_has_only_its_own_markup(tmp_path: Path, start: int) -> None:
    data = plant_data(str(tmp_path / "data"), pictures=False)
    value = {"entry": "lightgcn", "source": "", "metrics": {"recall@20": 0.2}, "note": ""}
    folder = plant(str(tmp_path / "sweep"), data, TWO, trials=4, seeds=2, published=[value])
    spoiled_sweep(folder, (NASTY[(start + number) % len(NASTY)] for number in range(10**9)))
    report(str(folder))
    written = folder.read_bytes("report.md").decode()
    tokens = PARSER.parse(written)
    blocks = {token.type.removesuffix("_open").removesuffix("_close") for token in tokens}
    assert blocks <= {
        "heading",
        "paragraph",
        "inline",
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        "bullet_list",
        "list_item",
    }
    shown = {child.type for token in tokens for child in token.children or []}
    assert shown <= {"text", "code_inline", "strong_open", "strong_close"}
    spans = {child.content for token in tokens for child in token.children or [] if child.type == "code_inline"}
    assert {span for span in spans if "winners/" not in span} <= set(SETTINGS)

    found = gather(str(folder))
    parts, _ = sections(found)
    names = {plain(name) for name in (found["sweep"]["name"], *(entry["title"] for entry in found["entries"]))}
    read = [words(token, shown) for token in tokens if token.type == "inline"]
    headings = {read[n] for n, token in enumerate(t for t in tokens if t.type == "inline") if token.level == 1}
    assert all(any(name in text for text in read) for name in names)
    assert len([token for token in tokens if token.type == "heading_open" and token.tag == "h1"]) == 1
    assert headings
    cells: list[list[str]] = []
    for before, token in pairwise(tokens):
        if before.type == "table_open":
            cells.append([])
        if token.type == "inline" and before.type in ("th_open", "td_open"):
            cells[-1].append(words(token, shown))
    for expected in tables_of(parts):
        assert [plain(cell) for cell in expected] in cells
    titles = read_items(found).titles
    told = "; ".join(plain(titles[item]) for item in found["examples"][0]["history"])
    assert any(told in row for row in cells)
    assert json.loads(folder.read_bytes("report.json")) == found
