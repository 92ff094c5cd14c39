"""Nothing that other people can write is unpickled: runs, datasets and encoder folders are shared."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*ROOT.glob("distrec/**/*.py"), *ROOT.glob("jobs/*.py")])

UNPICKLING = ("pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "torch.distributed.checkpoint")
# A call that unpickles unless it has this argument. The restricted unpickler behind `weights_only` builds tensors only;
# it reads the weights that an installed package ships.
SAFE_WITH = {
    "np.load": ("allow_pickle", False),
    "torch.load": ("weights_only", True),
    "loader.from_pretrained": ("trust_remote_code", False),
    "self.open(AutoModel": ("use_safetensors", True),
}
NEVER = (
    "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "eval", "exec", "pd.read_pickle", "torch.jit.load",
    "Tuner.restore", "gather_object", "dist.all_gather_object", "dist.broadcast_object_list",
)  # fmt: skip


def faults(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            modules = names if isinstance(node, ast.Import) else [f"{node.module}.{name}" for name in names]
            for module in modules:
                if any(f"{module}.".startswith(f"{name}.") for name in UNPICKLING):
                    yield f"line {node.lineno}: import of {module}"
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if node.args and ast.unparse(node.args[0]) == "AutoModel":
                called += "(AutoModel"
            if called in NEVER:
                yield f"line {node.lineno}: {called}"
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            for name, (argument, value) in SAFE_WITH.items():
                if called.endswith(name) and given.get(argument) != str(value):
                    yield f"line {node.lineno}: {called} without {argument}={value}"
            if called == "yaml.load" and not given.get("Loader", "").endswith(("_Loader", "SafeLoader")):
                yield f"line {node.lineno}: yaml.load without a safe loader"


@pytest.mark.parametrize("path", SOURCES, ids=[str(path.relative_to(ROOT)) for path in SOURCES])
def test_no_file_unpickles(path: Path) -> None:
    assert list(faults(path.read_text())) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import torch.distributed.checkpoint as dcp",
        "from torch.distributed import checkpoint",
        "np.load('a.npy')",
        "np.load('a.npy', allow_pickle=True)",
        "torch.load(path)",
        "yaml.load(text, Loader=yaml.Loader)",
        "loader.from_pretrained(folder)",
        "self.open(AutoModel, dtype='float32')",
        "dist.all_gather_object(out, mine)",
    ],
)
def test_the_search_finds_what_it_looks_for(source: str) -> None:
    assert list(faults(source))
