"""Nothing but the two adapters reaches inside DeepSpeed, TorchRec or fbgemm."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "distrec"
ADAPTERS = {"training/deepspeed_internals.py", "tables/torchrec_internals.py"}
PACKAGES = {"deepspeed", "torchrec", "fbgemm_gpu"}
# Encoders take apart the models of other packages, which publish no names for their layers.
PATHS = [path for path in sorted(ROOT.rglob("*.py")) if path.parent != ROOT / "encoders"]
# Public by name, but what is relied on is not documented.
INTERNAL = {
    "__compatible_ops__",
    "averaged_gradients",
    "basic_optimizer",
    "emb_module",
    "fp32_groups_flat_partition",
    "fp32_groups_gradient_flat_partition",
    "fp32_partitioned_groups_flat",
    "fused_optimizer",
    "local_shards",
    "single_partition_of_fp32_groups",
}


def reaches(tree: ast.AST) -> Iterator[str]:
    """What in a module reaches inside another package, as its source."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            private = node.attr.startswith("_") and not node.attr.endswith("__")
            if node.attr in INTERNAL or (private and not own):
                yield ast.unparse(node)
        elif isinstance(node, ast.Constant) and node.value in INTERNAL:
            yield ast.unparse(node)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            module = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in (alias.name for alias in node.names):
                path = ".".join([*module, name]).split(".")
                if path[0] in PACKAGES and any(part.startswith("_") for part in path):
                    yield ast.unparse(node)


@pytest.mark.parametrize("path", [path.relative_to(ROOT).as_posix() for path in PATHS])
def test_only_the_adapters_reach_inside(path: str):
    found = list(reaches(ast.parse((ROOT / path).read_text())))
    if path in ADAPTERS:
        assert found, f"{path} reaches inside nothing; delete it"
    else:
        assert found == [], f"{path} reaches inside another package: {found}; move that to one of {sorted(ADAPTERS)}"


@pytest.mark.parametrize(
    "source",
    [
        "engine.optimizer._link()",
        "self._engine._config",
        "optimizer.averaged_gradients",
        "getattr(optimizer, 'single_partition_of_fp32_groups')",
        "from torchrec.distributed import _secret",
        "import deepspeed.ops._ops",
    ],
)
def test_what_reaches_inside_is_seen(source: str):
    assert list(reaches(ast.parse(source)))
