"""Every reference in the repository has a target: references to pages, sections, anchors and paths.

A module that refers to sections by bracketed numbers, such as (3.4), names their page in its docstring:
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
SELF = "tests/test_references.py"  # it contains broken references on purpose
SUFFIXES, NAMES = (".py", ".yaml", ".md", ".sh", ".toml"), ("Makefile", "Dockerfile", ".ci/run")
WRITTEN = {"report.md"}  # `distrec report` writes it into a sweep folder

Files = Mapping[str, str | None]
"""Texts of the repository's files by path from the root; None for a file whose references are not checked."""

LABEL = r"(?:[1-9]\d?(?:\.[1-9]\d?[a-z]?)?|B[1-9])"
LABELS = rf"{LABEL}(?:(?:, |; | and | or | to ){LABEL})*"
PAGE = r"[\w<>*-][\w.<>*-]*(?:/[\w.<>*-]+)*\.md\b"
DECLARED = re.compile(r"Section numbers in brackets refer to (docs/[\w./-]+\.md)\.")
UNNAMED = re.compile(rf"(?<!\.md )\bsections? ({LABEL})\b")
BRACKETED = re.compile(rf"(?<![\w\])`}}])\(({LABELS})\)")


def tracked() -> dict[str, str | None]:
    """The files of this checkout, including those that git would add."""
    if not (ROOT / ".git").exists():
        pytest.skip("git lists the repository's files, and this folder is not a git checkout")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    names = [name for name in listed.split("\0") if name and (ROOT / name).exists()]
    wanted = [name for name in names if name.endswith(SUFFIXES) or name in NAMES]
    return dict.fromkeys(names) | {name: (ROOT / name).read_text() for name in wanted if name != SELF}


def texts(files: Files, *suffixes: str) -> Iterator[tuple[str, str]]:
    """Path and text of the files with one of `suffixes`, or of all files if no suffix is given."""
    for path, text in files.items():
        if text is not None and path.endswith(suffixes or ""):
            yield path, text


def offline(text: str) -> str:
    """The text without web addresses."""
    return re.sub(r"""https?://[^\s)>"'`]+""", "", text)


def resolved(files: Files, mention: str, source: str) -> str | None:
    """The file or folder that `mention` in `source` refers to, or None.

    Paths may be relative to the root, to docs/ or to the folder of `source`.
    """
    for base in ("", "docs", dirname(source)):
        path = normpath(join(base, mention))
        if path in files or any(name.startswith(f"{path}/") for name in files) or path == ".":
            return path
    return None


def exists(files: Files, mention: str, source: str) -> bool:
    """Whether `mention` in `source` refers to something. `*` and placeholders like `<name>` match anything."""
    pattern = re.sub(r"<[^>]*>", "*", mention)
    if "*" not in pattern:
        return resolved(files, mention, source) is not None
    return any(fnmatchcase(name, normpath(join(base, pattern))) for base in ("", "docs") for name in files)


def targets(text: str) -> str:
    """The text with Markdown links replaced by their targets."""
    return re.sub(r"\[[^\]]*\]\(", "(", text)


def one_line(text: str) -> str:
    """The text as one line, without the comment signs at the beginning of lines."""
    return re.sub(r"\s*\n\s*(?:#+ )?\s*", " ", text)


def headings(text: str) -> list[str]:
    """The headings of a page, except those in code blocks."""
    return re.findall(r"^#{1,6} +(.+?) *$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)


def sections(text: str) -> set[str]:
    """The section numbers in a page's headings."""
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
    """Mentions of Markdown files that do not exist."""
    return [
        f"{path}: {mention} does not exist"
        for path, text in texts(files)
        for mention in sorted(set(re.findall(rf"(?<![\w/.<*}}-])(?:\.\.?/)*{PAGE}", targets(offline(text)))))
        if mention not in WRITTEN and not exists(files, mention, path)
    ]


def wrong_sections(files: Files) -> list[str]:
    """Sections and promises that their page does not have, in references such as `X.md section N`."""
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
    """Markdown links to files that do not exist, and to anchors that a page does not have."""
    found = []
    for path, text in texts(files, ".md"):
        without_code = re.sub(r"^```.*?^```|`[^`]*`", "`", text, flags=re.M | re.S)
        for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", offline(without_code)):
            linked = normpath(join(dirname(path), target)) if target else path
            page = files.get(linked)
            if target and resolved({name: None for name in files}, linked, "") != linked:
                found.append(f"{path}: the link target {target} does not exist")
            elif anchor and (page is None or anchor not in anchors(page)):
                found.append(f"{path}: {target or path} has no anchor #{anchor}")
    return found


@cache
def prose(source: str) -> list[str]:
    """The comments, docstrings and setting descriptions of a module, in which bracketed numbers are references."""
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
    """Bracketed section numbers that the module's page does not have, or whose module names no page."""
    found = []
    for path, text in texts(files, ".py"):
        parts = prose(text)
        found += [f"{path}: no page is named for section {n}" for part in parts for n in UNNAMED.findall(part)]
        numbers = [number for part in parts for group in BRACKETED.findall(part) for number in re.findall(LABEL, group)]
        declared = DECLARED.findall(one_line(ast.get_docstring(ast.parse(text)) or ""))
        if not declared:  # a whole number in brackets is then no reference
            found += [f"{path}: no page is named for section ({n})" for n in numbers if not n.isdigit()]
            continue
        page = files.get(declared[0])
        found += [f"{path}: {declared[0]} has no section {n}" for n in numbers if n not in sections(page or "")]
    return found


def wrong_paths(files: Files) -> list[str]:
    """Paths from the root that README, CONTRIBUTING or docs/ mention and that do not exist."""
    rooms = sorted({name.partition("/")[0] for name in files if "/" in name})
    mentioned = re.compile(rf"(?<![\w./*>-])(?:{'|'.join(map(re.escape, rooms))})/[\w./<>*-]*")
    return [
        f"{path}: {mention} does not exist"
        for path, text in texts(files, ".md")
        if path in ("README.md", "CONTRIBUTING.md") or path.startswith("docs/")
        for mention in sorted({found.rstrip("./-") for found in mentioned.findall(offline(text))})
        if not exists(files, mention, "")
    ]


def wrong_methods(files: Files, methods: Mapping[str, tuple[str, list[str]]]) -> list[str]:
    """Methods that lack a page, a link to it in the index or in the module, or a setting on the page.

    Args:
        methods: for each method's name, the docstring of its module and its settings.
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
def test_every_reference_has_a_target(files: Files, rule):
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
    """Otherwise a rule could match nothing and pass."""
    parts = [part for _, text in texts(files, ".py") for part in prose(text)]
    assert sum(len(BRACKETED.findall(part)) for part in parts) > 40
    assert sum(bool(DECLARED.search(part)) for part in parts) >= 5
    assert sum(len(re.findall(rf"{PAGE} section", one_line(text))) for _, text in texts(files)) > 10
    assert sum(len(re.findall(r"\]\([^)]*#", text)) for _, text in texts(files, ".md")) > 5


PLANTED: dict[str, str | None] = {
    "README.md": "# Plain\n\nSee [page.md](docs/page.md#34-a-gate-code) and `lib/<name>.py`, `lib/deep/`.\n",
    "docs/page.md": "# A page\n\n## 3. Modules\n\n### 3.4 A `gate` (code)\n\n### B2 Patches\n\n[up](#3-modules)\n",
    "docs/other.md": "Sections: page.md sections 3 and\n3.4. Beside: ../README.md, <name>.md. `[1](gone)`, http://a.b/gone.md\n",
    "lib/deep/data.bin": None,
    "lib/good.py": '"""Section numbers in brackets refer to docs/page.md.\n\nGate (3.4),\nall (3, B2).\n"""\n'
    "# by Doe (2020), over (3) and f(9), x[0](9)\nn = (9.9)\nField(description='the gate (3.4)')\n",
    "lib/other.py": '"""See docs/page.md section 3.4. Exit status (2), half (0.5), report.md."""\n',
}
"""A small repository in which every reference has a target."""

BROKEN = [
    (wrong_pages, "docs/more.md", "See gone.md.", "gone.md does not exist"),
    (wrong_pages, "docs/more.md", "See [it](deep/gone.md).", "deep/gone.md does not exist"),
    (wrong_pages, "lib/more.py", "x = 1  # docs/gone.md says why", "docs/gone.md does not exist"),
    (wrong_pages, "Makefile", "# `make env`: see locks/README.md", "locks/README.md does not exist"),
    (wrong_pages, "docs/more.md", "Each has docs/deep/<name>.md.", "docs/deep/<name>.md does not exist"),
    (wrong_sections, "docs/more.md", "By page.md section 4.", "page.md has no section 4"),
    (wrong_sections, "lib/more.py", "# By docs/page.md\n# sections 3 and 3.5.", "docs/page.md has no section 3.5"),
    (wrong_sections, "docs/more.md", "By promise 4 of docs/page.md.", "docs/page.md has no promise 4"),
    (wrong_links, "docs/more.md", "[it](page.md#35-gate)", "page.md has no anchor #35-gate"),
    (wrong_links, "docs/more.md", "# More\n[it](#less)", "docs/more.md has no anchor #less"),
    (wrong_links, "docs/more.md", "[it](../lib/gone.py)", "the link target ../lib/gone.py does not exist"),
    (wrong_links, "docs/more.md", "[it](lib/good.py)", "the link target lib/good.py does not exist"),
    (wrong_brackets, "lib/more.py", '"""The gate (3.4)."""', "no page is named for section (3.4)"),
    (wrong_brackets, "lib/more.py", "x = 1  # patches (3, B2)", "no page is named for section (B2)"),
    (wrong_brackets, "lib/more.py", "Field(1, description='a gate (3.4)')", "no page is named for section (3.4)"),
    (wrong_brackets, "lib/more.py", "x = 1  # the gate of section 3.4", "no page is named for section 3.4"),
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
    (wrong_paths, "docs/more.md", "See `lib/gone.py`.", "lib/gone.py does not exist"),
    (wrong_paths, "CONTRIBUTING.md", "Write `lib/<name>.yaml`.", "lib/<name>.yaml does not exist"),
    (wrong_paths, "docs/more.md", "```\nrun lib/gone/it.yaml key=1\n```", "lib/gone/it.yaml does not exist"),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_good_references_pass(rule):
    assert rule(PLANTED) == []


@pytest.mark.parametrize(("rule", "path", "text", "message"), BROKEN, ids=lambda x: getattr(x, "__name__", None))
def test_a_broken_reference_is_found(rule, path: str, text: str, message: str):
    assert rule(PLANTED | {path: text}) == [f"{path}: {message}"]


@pytest.mark.parametrize(
    ("docstring", "page", "index", "messages"),
    [
        ("See docs/methods/it.md.", "# It\n`dim`", "[It](it.md)", []),
        ("See docs/methods/it.md.", None, "[It](it.md)", ["method it has no page docs/methods/it.md"]),
        ("It.", "# It\n`dim`", "[It](it.md)", ["the module of method it does not name docs/methods/it.md"]),
        ("See docs/methods/it.md.", "# It", "[It](it.md)", ["docs/methods/it.md does not name the setting dim"]),
        ("See docs/methods/it.md.", "`dim`", "", ["docs/methods/README.md does not link to it.md"]),
    ],
)
def test_a_method_without_its_page_is_found(docstring: str, page: str | None, index: str, messages: list[str]):
    planted = {"docs/methods/README.md": index} | ({} if page is None else {"docs/methods/it.md": page})
    assert wrong_methods(planted, {"it": (docstring, ["dim"])}) == messages
