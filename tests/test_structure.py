"""The order of the rooms, and imports that never go in a circle; those inside functions count like all others."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]

# From the ground up. What stands together on a floor does not import from one another.
FLOORS = [
    {"errors"},
    {"config", "runtime", "parallel"},
    {"data"},
    {"tables", "graph", "encoders"},
    {"methods", "evaluation"},
    {"training"},
    {"tuning"},
    {"cli", ""},  # "": the package itself, which offers `distrec.train`
]


def imports(root: Path) -> dict[str, set[str]]:
    """From every module of package `distrec` below `root` to those it imports anywhere in its text."""
    files = {_name(path.relative_to(root)): path for path in (root / "distrec").rglob("*.py")}
    graph = {}
    for name, path in files.items():
        found = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{name} line {node.lineno}: write imports from the package's name"
                inside = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= inside & files.keys()
                if inside - files.keys():  # names of the module itself
                    found.add(node.module)
        graph[name] = found & files.keys() - {name}
    return graph


def _name(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def room(module: str) -> str:
    """The first part of a module's name after `distrec`."""
    return module.split(".")[1] if "." in module else ""


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import one another in a circle, the first one again at the end; empty if there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def upward(graph: dict[str, set[str]]) -> list[str]:
    """Imports from a room that does not stand on a lower floor."""
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    return [
        f"{module} imports {other}"
        for module, others in graph.items()
        for other in sorted(others)
        if room(module) != room(other) and floor[room(module)] <= floor[room(other)]
    ]


def test_every_room_has_a_floor() -> None:
    assert {room(module) for module in imports(REPOSITORY)} == set().union(*FLOORS)


def test_no_module_imports_itself_by_way_of_others() -> None:
    assert circle(imports(REPOSITORY)) == []


def test_rooms_import_from_lower_floors_only() -> None:
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
def test_what_is_planted_is_found(
    tmp_path: Path, modules: dict[str, str], modules_of_circle: set[str], upwards: list[str]
) -> None:
    plant(tmp_path, ALONE | modules)
    graph = imports(tmp_path)
    assert set(circle(graph)) == modules_of_circle
    assert upward(graph) == upwards


def test_encoders_are_named_without_torch() -> None:
    code = "import sys, distrec.encoders.encode, distrec.encoders.stored; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60, cwd=REPOSITORY).returncode == 0
