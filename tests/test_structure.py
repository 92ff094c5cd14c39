"""Rooms import only from lower floors, and no imports are circular; imports inside functions count too."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]

# From the lowest floor up. Rooms on the same floor do not import from each other.
FLOORS = [
    {"errors"},
    {"config", "runtime", "cluster", "parallel"},
    {"arguments", "data"},
    {"tables", "graph", "encoders"},
    {"methods", "evaluation"},
    {"training"},
    {"sizing"},
    {"tuning"},
    {"submission"},
    {"doctor"},
    {"kubernetes"},
    {"cli", ""},  # "": the package itself, which has `distrec.train`
]


def imports(root: Path) -> dict[str, set[str]]:
    """For every module of package `distrec` below `root`, the modules of `distrec` that it imports anywhere."""
    files = {_name(path.relative_to(root)): path for path in (root / "distrec").rglob("*.py")}
    graph = {}
    for name, path in files.items():
        found = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{name} line {node.lineno}: use an absolute import"
                inside = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= inside & files.keys()
                if inside - files.keys():  # the import has names that are not modules
                    found.add(node.module)
        graph[name] = found & files.keys() - {name}
    return graph


def _name(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def room(module: str) -> str:
    """The first part of a module's name after `distrec`."""
    return module.split(".")[1] if "." in module else ""


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that form an import cycle, with the first repeated at the end; empty if there is no cycle."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def upward(graph: dict[str, set[str]]) -> list[str]:
    """Imports from another room that is not on a lower floor."""
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    return [
        f"{module} imports {other}"
        for module, others in graph.items()
        for other in sorted(others)
        if room(module) != room(other) and floor[room(module)] <= floor[room(other)]
    ]


def test_every_room_has_a_floor() -> None:
    assert {room(module) for module in imports(REPOSITORY)} == set().union(*FLOORS)


def test_no_imports_are_circular() -> None:
    assert circle(imports(REPOSITORY)) == []


def test_rooms_import_only_from_lower_floors() -> None:
    assert upward(imports(REPOSITORY)) == []


def plant(root: Path, modules: dict[str, str]) -> None:
    for name, text in modules.items():
        path = root / "distrec" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


ALONE = {"__init__.py": "", "errors.py": "", "data/__init__.py": "", "data/one.py": "", "graph/__init__.py": ""}
LATE = "def late():\n    {}\n"


@pytest.mark.parametrize(
    ("modules", "modules_of_circle", "upwards"),
    [
        ({"data/two.py": "import distrec.data.one\nfrom distrec import errors"}, set(), []),
        (
            {
                "data/one.py": LATE.format("from distrec.data.two import anything"),
                "data/two.py": LATE.format("from distrec.data import three"),
                "data/three.py": "import distrec.data.one",
            },
            {"distrec.data.one", "distrec.data.two", "distrec.data.three"},
            [],
        ),
        (
            {"data/two.py": LATE.format("from distrec.graph import anything")},
            set(),
            ["distrec.data.two imports distrec.graph"],
        ),
        (
            {"tables/block.py": "from distrec.graph.edges import edge", "graph/edges.py": ""},
            set(),
            ["distrec.tables.block imports distrec.graph.edges"],
        ),
    ],
)
def test_planted_faults_are_found(
    tmp_path: Path, modules: dict[str, str], modules_of_circle: set[str], upwards: list[str]
) -> None:
    plant(tmp_path, ALONE | modules)
    graph = imports(tmp_path)
    assert set(circle(graph)) == modules_of_circle
    assert upward(graph) == upwards


def test_encoders_are_listed_without_importing_torch() -> None:
    code = "import sys, distrec.encoders.encode, distrec.encoders.stored; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60, cwd=REPOSITORY).returncode == 0
