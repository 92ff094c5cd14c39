"""What Kubernetes makes of a pod's template: commands, environments and files, from rendered documents alone.

It is not Kubernetes, and a field that it does not know is refused, so that no test passes because a line of a manifest
was skipped. Fields without an effect on one machine, such as those for the scheduler, are listed as such.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from math import ceil
from typing import Any

_UNITS = {"n": "1e-9", "u": "1e-6", "m": "1e-3", "": "1", "k": "1e3", "M": "1e6", "G": "1e9", "T": "1e12", "P": "1e15",
          "E": "1e18", **{f"{unit}i": str(1024**power) for power, unit in enumerate("KMGTPE", 1)}}  # fmt: skip
_QUANTITY = re.compile(r"([+-]?[0-9.]+(?:[eE][+-]?[0-9]+)?)([a-zA-Z]*)")
_REFERENCE = re.compile(r"\$(\$|\(([-._a-zA-Z0-9]+)\))")
# Kinds and fields that change nothing of what runs inside the pods.
_WITHOUT_EFFECT = {
    "kinds": {"NetworkPolicy", "Namespace", "PodMonitor", "ServiceMonitor", "ServiceAccount", "Role", "RoleBinding"},
    "pod": {
        "affinity", "automountServiceAccountToken", "enableServiceLinks", "imagePullSecrets", "nodeSelector",
        "priorityClassName", "runtimeClassName", "schedulerName", "serviceAccountName", "tolerations",
        "topologySpreadConstraints",
    },
    "container": {"image", "imagePullPolicy", "livenessProbe", "name", "ports", "readinessProbe", "startupProbe"},
    "security": {
        "allowPrivilegeEscalation", "capabilities", "fsGroupChangePolicy", "privileged", "runAsNonRoot",
        "seccompProfile", "supplementalGroups",
    },
}  # fmt: skip


@dataclass(frozen=True)
class Mount:
    """A volume at a path of a container: files, memory, a claim's folder, or else an empty folder of its own.

    Attributes:
        path: where it is.
        volume: its name in the pod; a container's mounts of one volume see the same folder.
        files: contents by name, of a ConfigMap or Secret.
        mode: permissions of the files.
        key: the only part of the volume that is mounted, if not empty (`subPath`).
        memory: bytes of a folder in memory.
        claim: name of a PersistentVolumeClaim.
    """

    path: str
    volume: str
    files: Mapping[str, bytes] | None = None
    mode: int = 0o644
    key: str = ""
    memory: int | None = None
    claim: str = ""
    read_only: bool = False


@dataclass(frozen=True)
class Container:
    """A container: its whole command, and what the pod adds to the image."""

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    mounts: tuple[Mount, ...] = ()
    folder: str = ""  # the working directory; that of the image if empty
    user: int | None = None  # that of the image if None
    group: int | None = None
    files_group: int | None = None  # to which the files of its volumes are given (`fsGroup`)
    read_only: bool = False  # its root folder


@dataclass(frozen=True)
class Pod:
    """A pod: containers that run to their end one after the other, then the one that is its purpose.

    Attributes:
        grace: seconds between the request to end and the kill.
        restarts: whether the last container is started again when it has ended.
    """

    name: str
    init: tuple[Container, ...]
    main: Container
    grace: float
    restarts: bool


class Documents:
    """Rendered documents, and the pods that Kubernetes makes of the templates among them.

    Args:
        documents: as `kubectl kustomize` prints them, with the Secrets that they refer to.
        kind: the kind of the one document that is to run.

    Raises:
        ValueError: a kind, a field or a mode that these classes do not know.
    """

    def __init__(self, documents: Iterable[Mapping[str, Any]], kind: str):
        self._objects: dict[tuple[str, str], Mapping[str, Any]] = {}
        for document in documents:
            key = document["kind"], document["metadata"]["name"]
            if key in self._objects:
                raise ValueError(f"{key[0]} '{key[1]}' is there twice")
            self._objects[key] = document
        kinds = {kind, "ConfigMap", "Secret", "PersistentVolumeClaim"} | _WITHOUT_EFFECT["kinds"]
        known(dict(self._objects.keys()), "the documents", kinds)
        ((_, self.name),) = [key for key in self._objects if key[0] == kind]
        self.document = self._objects[kind, self.name]
        self.namespace = self.document["metadata"].get("namespace", "default")

    def pod(
        self,
        name: str,
        template: Mapping[str, Any],
        command: tuple[str, ...],
        own: Mapping[str, str],
        usual: Mapping[str, str],
        address: str = "",
    ) -> Pod:
        """A pod of a template.

        Args:
            command: of its container; that of the template if empty.
            own: variables that are set in any case.
            usual: variables that the template may set otherwise.
            address: what the pod sees as its own address.
        """
        spec = known(template["spec"], "a pod's spec", {
            "containers", "initContainers", "restartPolicy", "securityContext", "terminationGracePeriodSeconds",
            "volumes",
        } | _WITHOUT_EFFECT["pod"])  # fmt: skip
        if len(spec["containers"]) != 1:
            raise ValueError("the harness knows only pods of one container")
        volumes = {volume["name"]: volume for volume in spec.get("volumes", ())}
        facts = {
            "metadata.name": name, "metadata.namespace": self.namespace, "status.podIP": address,
            "status.hostIP": address, "spec.nodeName": name,
        }  # fmt: skip
        main = self._container(spec["containers"][0], spec, volumes, facts)
        variables = {**usual, **main.environment, **own}
        command = tuple(expanded(part, variables) for part in command) or main.command
        init = [self._container(container, spec, volumes, facts) for container in spec.get("initContainers", ())]
        main = replace(main, command=command, environment=variables)
        grace = float(spec.get("terminationGracePeriodSeconds", 30))
        return Pod(name, tuple(init), main, grace, restarts=spec.get("restartPolicy", "Always") == "Always")

    def _container(
        self,
        container: Mapping[str, Any],
        spec: Mapping[str, Any],
        volumes: Mapping[str, Mapping[str, Any]],
        facts: Mapping[str, str],
    ) -> Container:
        known(container, "a container", {
            "args", "command", "env", "envFrom", "resources", "securityContext", "volumeMounts", "workingDir",
        } | _WITHOUT_EFFECT["container"])  # fmt: skip
        security: dict[str, Any] = {**spec.get("securityContext", {}), **container.get("securityContext", {})}
        known(security, "a securityContext", {"fsGroup", "readOnlyRootFilesystem", "runAsGroup", "runAsUser"}
               | _WITHOUT_EFFECT["security"])  # fmt: skip
        environment = self._environment(container, facts)
        command = (*container.get("command", ()), *container.get("args", ()))
        return Container(
            container["name"], tuple(expanded(part, environment) for part in command), environment,
            tuple(self._mount(mount, volumes[mount["name"]]) for mount in container.get("volumeMounts", ())),
            container.get("workingDir", ""), security.get("runAsUser"), security.get("runAsGroup"),
            security.get("fsGroup"), bool(security.get("readOnlyRootFilesystem")),
        )  # fmt: skip

    def _environment(self, container: Mapping[str, Any], facts: Mapping[str, str]) -> dict[str, str]:
        found: dict[str, str] = {}
        for source in container.get("envFrom", ()):
            for reference, kind in (("configMapRef", "ConfigMap"), ("secretRef", "Secret")):
                if reference in source:
                    values = self.contents(kind, source[reference]["name"], source[reference].get("optional", False))
                    found |= {source.get("prefix", "") + name: value.decode() for name, value in values.items()}
        for entry in container.get("env", ()):
            known(entry, "env", {"name", "value", "valueFrom"})
            value = expanded(entry.get("value", ""), found) if "valueFrom" not in entry else None
            for reference, source in entry.get("valueFrom", {}).items():
                if reference == "fieldRef":
                    value = facts[source["fieldPath"]]
                elif reference in ("configMapKeyRef", "secretKeyRef"):
                    kind, optional = "ConfigMap" if "config" in reference else "Secret", source.get("optional", False)
                    values = self.contents(kind, source["name"], optional)
                    value = values[source["key"]].decode() if source["key"] in values or not optional else None
                else:
                    raise ValueError(f"the harness does not know valueFrom.{reference}")
            if value is not None:
                found[entry["name"]] = value
        return found

    def _mount(self, mount: Mapping[str, Any], volume: Mapping[str, Any]) -> Mount:
        known(mount, "volumeMounts", {"mountPath", "name", "readOnly", "subPath"})
        known(volume, f"volume '{volume['name']}'", {"name", "configMap", "secret", "emptyDir",
               "persistentVolumeClaim"})  # fmt: skip
        path, key, read_only = mount["mountPath"].rstrip("/"), mount.get("subPath", ""), mount.get("readOnly", False)
        for reference, kind, name in (("configMap", "ConfigMap", "name"), ("secret", "Secret", "secretName")):
            if reference in volume:
                source = known(volume[reference], reference, {name, "defaultMode", "items", "optional"})
                files = self.contents(kind, source[name], source.get("optional", False))
                if "items" in source:
                    files = {item["path"]: files[item["key"]] for item in source["items"]}
                if key and key not in files:
                    raise ValueError(f"{kind} '{source[name]}' has no key '{key}', which '{path}' mounts")
                return Mount(path, volume["name"], files, source.get("defaultMode", 0o644), key, read_only=True)
        if "persistentVolumeClaim" in volume:
            claim = volume["persistentVolumeClaim"]["claimName"]
            if ("PersistentVolumeClaim", claim) not in self._objects:
                raise ValueError(f"there is no PersistentVolumeClaim '{claim}'")
            return Mount(path, volume["name"], key=key, claim=claim, read_only=read_only)
        folder = known(volume["emptyDir"] or {}, "emptyDir", {"medium", "sizeLimit"})
        memory = ceil(quantity(folder.get("sizeLimit", "2Gi"))) if folder.get("medium") == "Memory" else None
        return Mount(path, volume["name"], key=key, memory=memory, read_only=read_only)

    def contents(self, kind: str, name: str, optional: bool = False) -> dict[str, bytes]:
        """The entries of a ConfigMap or Secret."""
        found = self._objects.get((kind, name))
        if found is None:
            if optional:
                return {}
            raise ValueError(f"there is no {kind} '{name}'; its pod would wait for it for ever")
        encoded = found.get("binaryData", {}) if kind == "ConfigMap" else found.get("data", {})
        plain = found.get("data", {}) if kind == "ConfigMap" else found.get("stringData", {})
        values = {key: base64.b64decode(value) for key, value in encoded.items()}
        return values | {key: value.encode() for key, value in plain.items()}


class PlainJob(Documents):
    """A Job of Kubernetes itself among rendered documents."""

    def __init__(self, documents: Iterable[Mapping[str, Any]]):
        super().__init__(documents, "Job")
        self._spec = known(self.document["spec"], "Job.spec", {
            "activeDeadlineSeconds", "backoffLimit", "template", "ttlSecondsAfterFinished",
        })  # fmt: skip

    def one_pod(self) -> Pod:
        """The pod of one try."""
        return self.pod(self.name, self._spec["template"], (), {}, {})


def known(fields: Mapping[str, Any], where: str, names: set[str]) -> Mapping[str, Any]:
    """`fields`, all of which must be in `names`."""
    if other := fields.keys() - names:
        raise ValueError(f"the harness does not know {', '.join(sorted(other))} in {where}")
    return fields


def quantity(text: str | int | float) -> Decimal:
    """The number that a Kubernetes quantity such as 500m or 8Gi stands for."""
    match = _QUANTITY.fullmatch(str(text))
    if match is None or match[2] not in _UNITS:
        raise ValueError(f"'{text}' is not a quantity")
    return Decimal(match[1]) * Decimal(_UNITS[match[2]])


def expanded(text: str, variables: Mapping[str, str]) -> str:
    """`text` with the variables that it names as `$(NAME)`; `$$` is a `$`, and unknown names stay."""
    return _REFERENCE.sub(lambda found: "$" if found[1] == "$" else variables.get(found[2], found[0]), text)
