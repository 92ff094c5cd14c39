"""`distrec manifest VERB … --out FOLDER`: check everything, then write a folder for `kubectl apply -k`."""

from __future__ import annotations

import argparse
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from distrec.config.paths import local_path
from distrec.errors import InputError, shown
from distrec.kubernetes import rules
from distrec.kubernetes.templates import render
from distrec.kubernetes.workload import Workload, planned_memory, workload
from distrec.submission.cluster import choose_address
from distrec.submission.environment import STOP_WAIT

# Where the driver, or the submitter, has its configs; "": in its working folder.
_FOLDERS = {"RayJob": "/etc/distrec", "RayCluster": "", "Job": ""}
_HOME = "/home/distrec"  # the working folder of the image
_HEAD_MEMORY = "5Gi"
_RETRIES = 3
_POD_SECONDS = 600  # for the images of head and workers to be pulled


@dataclass(frozen=True)
class Options:
    """The options of `distrec manifest`; see its help."""

    out: str
    kind: str = "RayJob"
    overlays: Sequence[str] = ()
    name: str | None = None
    image: str | None = None
    image_extras: Sequence[str] = ()
    memory: str | None = None
    pods: int | None = None
    queue: str | None = None
    secret: str | None = None
    claim: str | None = None
    mount: str | None = None
    address: str | None = None

    def command(self, verb: str, arguments: Sequence[str]) -> list[str]:
        """The command that gives these files again, without the place to which they are written, in lines."""
        words = [f"--overlay {name}" for name in self.overlays]
        words += [f"--image-extra {shlex.quote(name)}" for name in self.image_extras]
        for option in ("name", "image", "memory", "pods", "queue", "secret", "claim", "mount", "address"):
            if (value := getattr(self, option)) is not None:
                words.append(f"--{option} {shlex.quote(str(value))}")
        if self.kind != "RayJob":
            words.insert(0, f"--kind {self.kind}")
        first = shlex.join(["distrec", "manifest", verb, *arguments[:1]])
        lines = [first, *map(shlex.quote, arguments[1:]), *words]
        return [f"{line} \\" for line in lines[:-1]] + lines[-1:]


def manifest(parsed: argparse.Namespace, arguments: Sequence[str], options: Options) -> Path:
    """Write the manifests of a verb into a new folder, and return it.

    Args:
        parsed: the verb's arguments, as its own parser reads them.
        arguments: the same as they were given, without the verb.
        options: the options of `distrec manifest`.

    Raises:
        InputError: Kubernetes, the operator or the pods would not accept or survive it; nothing was written.
    """
    texts = manifests(parsed, arguments, options)
    out = Path(local_path(options.out, "option '--out':"))
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise InputError(f"'{out}' is there already; give a new folder as --out, or delete it.")
        for name, text in texts.items():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"'{out}' cannot be written ({error}); give another folder as --out.") from None
    return out


def manifests(parsed: argparse.Namespace, arguments: Sequence[str], options: Options) -> dict[str, str]:
    """The texts of the manifests by path inside the folder. Raises the same as `manifest`."""
    kind, overlays = options.kind, options.overlays
    rules.check_readers(kind, overlays, vars(options))
    folder = _FOLDERS[kind]
    work = workload(parsed, arguments, folder, options.pods)
    name = work.name if options.name is None else options.name
    image = f"distrec:{version('distrec')}" if options.image is None else options.image
    mount = options.mount or "/data"
    rules.check_name(name, kind)
    rules.check_image(image)
    rules.check_extras(work.mlflow, options.image_extras)
    names = {"secret": options.secret, "queue": options.queue, "claim": options.claim}
    for option, given in names.items():
        if given is not None:
            rules.check_resource_name(given, option)
    rules.check_mount(mount)
    rules.check_overlays(kind, overlays, work.least == work.most, work.places)
    rules.check_places(kind, overlays, mount, work.places)
    memory, planned = options.memory or work.memory, False
    if kind != "Job":
        memory, planned = (planned_memory(work.planned), True) if memory is None else (memory, False)
        rules.memory_bytes(memory)
    files = {} if kind == "RayCluster" else work.files
    stop = int(STOP_WAIT["RAY_JOB_STOP_WAIT_TIME_S"])
    values = {
        "kind": kind,
        "name": name,
        "image": image,
        "ray": version("ray"),
        "command": options.command(work.verb, arguments),
        "files": list(files),
        "folder": _HOME if kind == "Job" else folder,
        "stop": stop,
        "head_memory": _HEAD_MEMORY,
        "retries": _RETRIES,
        "start_seconds": math.ceil(work.wait) + _POD_SECONDS,
        "start_reason": f"{work.wait_key} ({work.wait:g} s), and ten minutes to pull images.",
        "most_seconds": math.ceil(3600 * work.hours),
        "cpus": work.cpus,
        "memory": memory,
        "resources_reason": _resources(work, options, planned),
        "overlays": list(overlays),
        "queue": options.queue or "default",
        "secret": options.secret or ("distrec-token" if kind == "Job" else "distrec-s3"),
        "claim": options.claim or "distrec",
        "mount": mount,
        **_pods(work, kind, "autoscaling" in overlays),
        **_paths(kind),
    }
    if kind == "RayJob":
        values["entrypoint"] = rules.check_entrypoint(["distrec", work.verb, *work.arguments])
    if kind == "Job":
        address = choose_address(options.address, {})
        values["words"] = ["distrec", "submit", work.verb, *work.arguments, "--address", address]
    resources = [f"{kind.lower()}.yaml"] + (["network-policy.yaml"] if kind != "Job" else [])
    texts = {f"base/{resource}": render(resource, values) for resource in resources}
    texts |= {f"base/{file}": text for file, text in files.items()}
    texts["base/kustomization.yaml"] = render("base.yaml", values | {"resources": resources})
    for overlay in overlays:
        texts[f"overlays/{overlay}/kustomization.yaml"] = render(f"overlays/{overlay}.yaml", values)
        if overlay == "monitoring":
            texts[f"overlays/{overlay}/pod-monitor.yaml"] = render("overlays/pod-monitor.yaml", values)
    texts["kustomization.yaml"] = render("kustomization.yaml", values)
    return texts


def _pods(work: Workload, kind: str, autoscaling: bool) -> dict[str, object]:
    """How many worker pods there are. Without an autoscaler, a job waits until all of them are ready."""
    if kind == "RayCluster":
        least = 0 if autoscaling else work.most
        return {"pods": work.most, "least_pods": least, "most_pods": work.most, "pods_reason": work.pods_reason}
    reason = work.pods_reason
    if work.least < work.most and not autoscaling:
        reason += "; without overlay 'autoscaling', the job starts when all of them are ready"
    return {"pods": work.most, "least_pods": work.least, "most_pods": work.most, "pods_reason": reason}


def _resources(work: Workload, options: Options, planned: bool) -> str:
    if planned:
        memory = "memory is 5/4 of what 'distrec plan' says, and 1.5Gi for Ray"
    elif options.memory is not None:
        memory = "memory is --memory"
    else:
        memory = "memory has room for both default encoders"
    return f"CPUs are {work.cpus_key}; {memory}."


def _paths(kind: str) -> dict[str, object]:
    """Where patches find the specification of the cluster, and the containers whose Ray may ask for a token."""
    at = {"RayJob": "/spec/rayClusterSpec", "RayCluster": "/spec", "Job": "/spec"}[kind]
    groups = [f"{at}/headGroupSpec", f"{at}/workerGroupSpecs/0"]
    containers = [f"{group}/template/spec/containers/0" for group in groups]
    if kind == "RayJob":
        containers.append("/spec/submitterPodTemplate/spec/containers/0")
    return {"at": at, "auth_containers": containers}


def told(options: Options, out: Path) -> str:
    """What to do next, for the user."""
    folder = shown(options.out, 300, quoted=False)
    return f"wrote '{out}'; look at it with 'kubectl kustomize {folder}', start it with 'kubectl apply -k {folder}'"
