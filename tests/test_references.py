"""Every reference in the repository leads somewhere: pages, their sections and anchors, and paths that documents name.

A module that refers to sections by bracketed numbers, such as (3.4), says in its docstring of which page they are:
"Section numbers in brackets refer to docs/methods/NAME.md."
"""

from __future__ import annotations

import ast
import inspect
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from posixpath import dirname, join, normpath

import pytest

from distrec.methods.registry import METHODS

ROOT = Path(__file__).parents[1]
SELF = "tests/test_references.py"  # its planted references are wrong on purpose
SUFFIXES, NAMES = (".py", ".yaml", ".md", ".sh", ".toml"), ("Makefile", "Dockerfile", ".ci/run")
WRITTEN = {"report.md"}  # by `distrec report` into a sweep folder

Files = Mapping[str, str | None]
"""Text of each file of the repository by its path from the root; None where references are not looked for."""

LABEL = r"(?:[1-9]\d?(?:\.[1-9]\d?[a-z]?)?|B[1-9])"
LABELS = rf"{LABEL}(?:(?:, |; | and | or | to ){LABEL})*"
PAGE = r"[\w<>*-][\w.<>*-]*(?:/[\w.<>*-]+)*\.md\b"
DECLARED = re.compile(r"Section numbers in brackets refer to (docs/[\w./-]+\.md)\.")
UNNAMED = re.compile(rf"(?<!\.md )\bsections? ({LABEL})\b")
BRACKETED = re.compile(rf"(?<![\w\])`}}])\(({LABELS})\)")


def tracked() -> dict[str, str | None]:
    """The files of this checkout, those included that git would add."""
    if not (ROOT / ".git").exists():
        pytest.skip("the files of the repository are listed by git, and this is no checkout")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    names = [name for name in listed.split("\0") if name and (ROOT / name).exists()]
    wanted = [name for name in names if name.endswith(SUFFIXES) or name in NAMES]
    return dict.fromkeys(names) | {name: (ROOT / name).read_text() for name in wanted if name != SELF}


def texts(files: Files, *suffixes: str) -> Iterator[tuple[str, str]]:
    """Path and text of the files with one of `suffixes`, or of all files without any."""
    for path, text in files.items():
        if text is not None and path.endswith(suffixes or ""):
            yield path, text


def offline(text: str) -> str:
    """The text without web addresses."""
    return re.sub(r"""https?://[^\s)>"'`]+""", "", text)


def resolved(files: Files, mention: str, source: str) -> str | None:
    """The file or folder that `source` means by `mention`: from the root, from docs/, or from its own folder."""
    for base in ("", "docs", dirname(source)):
        path = normpath(join(base, mention))
        if path in files or any(name.startswith(f"{path}/") for name in files) or path == ".":
            return path
    return None


def exists(files: Files, mention: str, source: str) -> bool:
    """As `resolved`; a placeholder `<name>` and `*` stand for anything, and something must be there."""
    pattern = re.sub(r"<[^>]*>", "*", mention)
    if "*" not in pattern:
        return resolved(files, mention, source) is not None
    return any(fnmatchcase(name, normpath(join(base, pattern))) for base in ("", "docs") for name in files)


def targets(text: str) -> str:
    """The text with what Markdown links lead to in place of their words."""
    return re.sub(r"\[[^\]]*\]\(", "(", text)


def one_line(text: str) -> str:
    """The text with lines joined, comment signs at their beginning left out."""
    return re.sub(r"\s*\n\s*(?:#+ )?\s*", " ", text)


def headings(text: str) -> list[str]:
    """The headings of a page, without those in blocks of code."""
    return re.findall(r"^#{1,6} +(.+?) *$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)


def sections(text: str) -> set[str]:
    """The numbers of a page's headings."""
    found = (re.match(rf"({LABEL})\.?(?: |$)", heading) for heading in headings(text))
    return {match[1] for match in found if match}


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    found: set[str] = set()
    for heading in headings(text):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        anchor = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        number, unique = 0, anchor
        while unique in found:
            number += 1
            unique = f"{anchor}-{number}"
        found.add(unique)
    return found


def wrong_pages(files: Files) -> list[str]:
    """Mentions of Markdown files that are not there."""
    return [
        f"{path}: {mention} is no file"
        for path, text in texts(files)
        for mention in sorted(set(re.findall(rf"(?<![\w/.<*}}-])(?:\.\.?/)*{PAGE}", targets(offline(text)))))
        if mention not in WRITTEN and not exists(files, mention, path)
    ]


def wrong_sections(files: Files) -> list[str]:
    """`X.md section N` where X.md has no heading of that number, and promises that the design does not number."""
    found = []
    for path, text in texts(files):
        for mention, numbers in re.findall(rf"({PAGE}) sections? ({LABELS})", one_line(text)):
            page = files.get(resolved(files, mention, path) or "")
            for number in re.findall(LABEL, numbers) if page is not None else []:
                if number not in sections(page):
                    found.append(f"{path}: {mention} has no section {number}")
        for number, mention in re.findall(rf"[Pp]romise (\d) of ({PAGE})", one_line(text)):
            page = files.get(resolved(files, mention, path) or "")
            if page is not None and not re.search(rf"^(?:#+ )?{number}\. ", page, re.M):
                found.append(f"{path}: {mention} has no promise {number}")
    return found


def wrong_links(files: Files) -> list[str]:
    """Markdown links to what is not there, and to anchors that a page does not have."""
    found = []
    for path, text in texts(files, ".md"):
        prose = re.sub(r"^```.*?^```|`[^`]*`", "`", text, flags=re.M | re.S)
        for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", offline(prose)):
            linked = normpath(join(dirname(path), target)) if target else path
            page = files.get(linked)
            if target and resolved({name: None for name in files}, linked, "") != linked:
                found.append(f"{path}: the link to {target} leads to no file")
            elif anchor and (page is None or anchor not in anchors(page)):
                found.append(f"{path}: {target or path} has no anchor #{anchor}")
    return found


@cache
def spoken(source: str) -> list[str]:
    """The comments, docstrings and descriptions of settings in a module, where numbers in brackets are references."""
    comments: list[tuple[int, str]] = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            line = token.start[0]
            if comments and comments[-1][0] == line - 1:
                comments[-1] = line, f"{comments[-1][1]} {token.string.lstrip('# ')}"
            else:
                comments.append((line, token.string))
    found = [text for _, text in comments]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found.append(ast.get_docstring(node) or "")
        elif isinstance(node, ast.keyword) and node.arg == "description" and isinstance(node.value, ast.Constant):
            found.append(str(node.value.value))
    return [one_line(text) for text in found]


def wrong_brackets(files: Files) -> list[str]:
    """Section numbers in brackets that are not those of the module's page, or in a module that names no page."""
    found = []
    for path, text in texts(files, ".py"):
        said = spoken(text)
        found += [f"{path}: section {n} is of no page" for part in said for n in UNNAMED.findall(part)]
        numbers = [number for part in said for group in BRACKETED.findall(part) for number in re.findall(LABEL, group)]
        declared = DECLARED.findall(one_line(ast.get_docstring(ast.parse(text)) or ""))
        if not declared:  # there a whole number in brackets is a number
            found += [f"{path}: ({n}) is a section of no page" for n in numbers if not n.isdigit()]
            continue
        page = files.get(declared[0])
        found += [f"{path}: {declared[0]} has no section {n}" for n in numbers if n not in sections(page or "")]
    return found


def wrong_paths(files: Files) -> list[str]:
    """Paths from the root that README, CONTRIBUTING and docs/ name and that are not there."""
    rooms = sorted({name.partition("/")[0] for name in files if "/" in name})
    mentioned = re.compile(rf"(?<![\w./*>-])(?:{'|'.join(map(re.escape, rooms))})/[\w./<>*-]*")
    return [
        f"{path}: {mention} is not there"
        for path, text in texts(files, ".md")
        if path in ("README.md", "CONTRIBUTING.md") or path.startswith("docs/")
        for mention in sorted({found.rstrip("./-") for found in mentioned.findall(offline(text))})
        if not exists(files, mention, "")
    ]


def wrong_methods(files: Files, methods: Mapping[str, tuple[str, list[str]]]) -> list[str]:
    """Methods without a page, or whose module, page or index leaves something out.

    Args:
        methods: docstring of the module and settings, by name.
    """
    found, index = [], files.get("docs/methods/README.md") or ""
    for name, (docstring, settings) in methods.items():
        page = f"docs/methods/{name}.md"
        text = files.get(page)
        if text is None:
            found.append(f"method {name} has no page {page}")
            continue
        if page not in one_line(docstring):
            found.append(f"the module of method {name} does not name {page}")
        if f"]({name}.md)" not in index:
            found.append(f"docs/methods/README.md does not link to {name}.md")
        found += [f"{page} does not name the setting {key}" for key in settings if f"`{key}`" not in text]
    return found


RULES = [wrong_pages, wrong_sections, wrong_links, wrong_brackets, wrong_paths]


@pytest.fixture(scope="module")
def files() -> dict[str, str | None]:
    return tracked()


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_every_reference_leads_somewhere(files: Files, rule):
    found = dict.fromkeys(rule(files))
    assert not found, "\n".join(["", *found])


def test_every_method_has_its_page(files: Files):
    registered = {
        name: (
            inspect.getdoc(sys.modules[kind.__module__]) or "",
            [key for key in kind.Config.model_fields if key != "name"],
        )
        for name, kind in METHODS.items()
    }
    found = wrong_methods(files, registered)
    assert not found, "\n".join(["", *found])


def test_the_repository_has_references_of_every_kind(files: Files):
    """A rule that matches nothing would pass."""
    said = [part for _, text in texts(files, ".py") for part in spoken(text)]
    assert sum(len(BRACKETED.findall(part)) for part in said) > 40
    assert sum(bool(DECLARED.search(part)) for part in said) >= 5
    assert sum(len(re.findall(rf"{PAGE} section", one_line(text))) for _, text in texts(files)) > 10
    assert sum(len(re.findall(r"\]\([^)]*#", text)) for _, text in texts(files, ".md")) > 5


PLANTED: dict[str, str | None] = {
    "README.md": "# Plain\n\nSee [page.md](docs/page.md#34-a-gate-code) and `lib/<name>.py`, `lib/deep/`.\n",
    "docs/page.md": "# A page\n\n## 3. Modules\n\n### 3.4 A `gate` (code)\n\n### B2 Patches\n\n[up](#3-modules)\n",
    "docs/other.md": "Sections: page.md sections 3 and\n3.4. Beside: ../README.md, <name>.md. `[1](gone)`, http://a.b/gone.md\n",
    "lib/deep/data.bin": None,
    "lib/told.py": '"""Section numbers in brackets refer to docs/page.md.\n\nGate (3.4),\nall (3, B2).\n"""\n'
    "# by Doe (2020), over (3) and f(9), x[0](9)\nn = (9.9)\nField(description='the gate (3.4)')\n",
    "lib/other.py": '"""See docs/page.md section 3.4. Exit status (2), half (0.5), report.md."""\n',
}
"""A small repository in which every reference leads somewhere."""

BROKEN = [
    (wrong_pages, "docs/more.md", "See gone.md.", "gone.md is no file"),
    (wrong_pages, "docs/more.md", "See [it](deep/gone.md).", "deep/gone.md is no file"),
    (wrong_pages, "lib/more.py", "x = 1  # docs/gone.md says why", "docs/gone.md is no file"),
    (wrong_pages, "Makefile", "# `make env`: see locks/README.md", "locks/README.md is no file"),
    (wrong_pages, "docs/more.md", "Each has docs/deep/<name>.md.", "docs/deep/<name>.md is no file"),
    (wrong_sections, "docs/more.md", "By page.md section 4.", "page.md has no section 4"),
    (wrong_sections, "lib/more.py", "# By docs/page.md\n# sections 3 and 3.5.", "docs/page.md has no section 3.5"),
    (wrong_sections, "docs/more.md", "By promise 4 of docs/page.md.", "docs/page.md has no promise 4"),
    (wrong_links, "docs/more.md", "[it](page.md#35-gate)", "page.md has no anchor #35-gate"),
    (wrong_links, "docs/more.md", "# More\n[it](#less)", "docs/more.md has no anchor #less"),
    (wrong_links, "docs/more.md", "[it](../lib/gone.py)", "the link to ../lib/gone.py leads to no file"),
    (wrong_links, "docs/more.md", "[it](lib/told.py)", "the link to lib/told.py leads to no file"),
    (wrong_brackets, "lib/more.py", '"""The gate (3.4)."""', "(3.4) is a section of no page"),
    (wrong_brackets, "lib/more.py", "x = 1  # patches (3, B2)", "(B2) is a section of no page"),
    (wrong_brackets, "lib/more.py", "Field(1, description='a gate (3.4)')", "(3.4) is a section of no page"),
    (wrong_brackets, "lib/more.py", "x = 1  # the gate of section 3.4", "section 3.4 is of no page"),
    (
        wrong_brackets,
        "lib/more.py",
        '"""Section numbers in brackets refer to\ndocs/page.md."""\nx = 1  # all (3 to\n# 3.5)',
        "docs/page.md has no section 3.5",
    ),
    (
        wrong_brackets,
        "lib/more.py",
        '"""Section numbers in brackets refer to docs/page.md. The end (5)."""',
        "docs/page.md has no section 5",
    ),
    (wrong_paths, "docs/more.md", "See `lib/gone.py`.", "lib/gone.py is not there"),
    (wrong_paths, "CONTRIBUTING.md", "Write `lib/<name>.yaml`.", "lib/<name>.yaml is not there"),
    (wrong_paths, "docs/more.md", "```\nrun lib/gone/it.yaml key=1\n```", "lib/gone/it.yaml is not there"),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_good_references_pass(rule):
    assert rule(PLANTED) == []


@pytest.mark.parametrize(("rule", "path", "text", "told"), BROKEN, ids=lambda x: getattr(x, "__name__", None))
def test_a_broken_reference_is_told(rule, path: str, text: str, told: str):
    assert rule(PLANTED | {path: text}) == [f"{path}: {told}"]


@pytest.mark.parametrize(
    ("docstring", "page", "index", "told"),
    [
        ("See docs/methods/it.md.", "# It\n`dim`", "[It](it.md)", []),
        ("See docs/methods/it.md.", None, "[It](it.md)", ["method it has no page docs/methods/it.md"]),
        ("It.", "# It\n`dim`", "[It](it.md)", ["the module of method it does not name docs/methods/it.md"]),
        ("See docs/methods/it.md.", "# It", "[It](it.md)", ["docs/methods/it.md does not name the setting dim"]),
        ("See docs/methods/it.md.", "`dim`", "", ["docs/methods/README.md does not link to it.md"]),
    ],
)
def test_a_method_without_its_page_is_told(docstring: str, page: str | None, index: str, told: list[str]):
    planted = {"docs/methods/README.md": index} | ({} if page is None else {"docs/methods/it.md": page})
    assert wrong_methods(planted, {"it": (docstring, ["dim"])}) == told
