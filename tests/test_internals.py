"""Only the adapter modules use the internals of DeepSpeed, TorchRec, fbgemm and Ray."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "distrec"
ADAPTERS = {
    "training/deepspeed_internals.py", "tables/torchrec_internals.py", "cluster/ray_internals.py",
    "sizing/torch_internals.py", "submission/ray_internals.py", "tuning/ray_tune_internals.py",
}  # fmt: skip
PACKAGES = {"deepspeed", "torchrec", "fbgemm_gpu", "ray"}
# Encoders are exempt: they need layers of models from other packages, which have no public names for them.
PATHS = [path for path in sorted(ROOT.rglob("*.py")) if path.parent != ROOT / "encoders"]
# Names that look public although the behaviour that distrec relies on is not documented.
INTERNAL = {
    "ENV_VARS_TO_PROPAGATE",
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


def internals(tree: ast.AST) -> Iterator[str]:
    """The expressions and imports in a module that use another package's internals, as source text."""
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
def test_only_the_adapters_use_internals(path: str):
    found = list(internals(ast.parse((ROOT / path).read_text())))
    if path in ADAPTERS:
        assert found, f"{path} uses no internals; delete it"
    else:
        assert found == [], f"{path} uses another package's internals: {found}; move them to one of {sorted(ADAPTERS)}"


@pytest.mark.parametrize(
    "source",
    [
        "engine.optimizer._link()",
        "self._engine._config",
        "optimizer.averaged_gradients",
        "getattr(optimizer, 'single_partition_of_fp32_groups')",
        "from torchrec.distributed import _secret",
        "import deepspeed.ops._ops",
        "from ray._private import services",
    ],
)
def test_uses_of_internals_are_found(source: str):
    assert list(internals(ast.parse(source)))
