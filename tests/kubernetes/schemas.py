"""Strict schemas of manifests: KubeRay's custom resource definitions, and the kinds of Kubernetes itself.

`kubernetes-validate` knows the latter only, and says of others just that it has no schema.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from jsonschema import Draft202012Validator

DEFINITIONS = Path(__file__).resolve().parents[3] / "shared" / "kuberay"  # beside the repository; see its README there
KUBERNETES = "1.37"

needs_definitions = pytest.mark.skipif(
    not DEFINITIONS.is_dir(), reason="KubeRay's custom resource definitions are not in shared/kuberay"
)


def complaints(manifest: dict[str, Any]) -> list[str]:
    """What is wrong with the fields of one manifest; unknown fields are wrong."""
    if manifest["apiVersion"] == "ray.io/v1":
        errors = _custom(manifest["kind"]).iter_errors(manifest)
        return [f"{'.'.join(map(str, error.absolute_path))}: {error.message[:300]}" for error in errors]
    if manifest["kind"] == "PodMonitor":  # of the Prometheus Operator, whose definitions are not here
        return []
    try:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [str(error)]
    return []


@cache
def _custom(kind: str) -> Draft202012Validator:
    schema = strict(definition(kind)["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}  # Kubernetes checks it itself
    return Draft202012Validator(schema)


@cache
def definition(kind: str) -> dict[str, Any]:
    """Version v1 of KubeRay's definition of a kind."""
    file = DEFINITIONS / f"ray.io_{kind.lower()}s.yaml"
    whole = yaml.load(file.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    (found,) = (version for version in whole["spec"]["versions"] if version["name"] == "v1")
    return dict(found)


def strict(schema: Any) -> Any:
    """An OpenAPI v3 schema of Kubernetes as a JSON schema that refuses unknown fields."""
    if isinstance(schema, list):
        return [strict(entry) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: strict(value) for key, value in schema.items() if not key.startswith("x-kubernetes-")}
    closed = schema.get("type") == "object" and not schema.get("x-kubernetes-preserve-unknown-fields")
    if closed and isinstance(schema.get("properties"), dict):
        found.setdefault("additionalProperties", False)
    if schema.get("x-kubernetes-int-or-string"):
        found.pop("type", None)
        found["anyOf"] = [{"type": "integer"}, {"type": "string"}]
        if "pattern" in found:  # applies to strings only, which is what JSON Schema says as well
            found["anyOf"][1]["pattern"] = found.pop("pattern")
    if found.pop("nullable", False):
        found = {"anyOf": [found, {"type": "null"}]}
    return found
