"""What makes a manifest wrong before anything is written. Each rule raises an `InputError` of one sentence.

The limits of names come from KubeRay's own validation, which only a cluster with the operator would report.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Mapping, Sequence
from pathlib import PurePosixPath

from distrec.config.paths import PATH_WIDTH, REMOTE
from distrec.config.tree import nearest
from distrec.errors import InputError, shown

KINDS = ("RayJob", "RayCluster", "Job")
OVERLAYS = ("cpu", "gpu", "kueue", "volcano", "autoscaling", "token", "s3", "pvc", "monitoring")
_OF_JOB = ("kueue", "token")  # overlays of a plain Job, whose cluster has been started by somebody else
# Overlays that exclude each other, and why.
_EXCLUSIVE = {
    ("cpu", "gpu"): "one keeps pods off hosts with GPUs and the other asks for GPUs",
    ("kueue", "volcano"): "two systems would queue the same pods",
    ("kueue", "autoscaling"): "Kueue admits a fixed number of pods and refuses a job with Ray's autoscaler",
}
# The overlays that read an option.
_READERS = {"queue": ("kueue", "volcano"), "secret": ("s3", "token"), "claim": ("pvc",), "mount": ("pvc",)}

MOST_NAME = {"RayJob": 47, "RayCluster": 50, "Job": 63}
_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_QUANTITY = re.compile(r"([1-9][0-9]{0,5})(Mi|Gi|Ti)")
_UNITS = {"Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
_LEAST_MEMORY = 2**30
_IMAGE = re.compile(
    r"([a-z0-9]([a-z0-9.-]*[a-z0-9])?(:[0-9]{1,5})?/)?[a-z0-9]+([._/-]+[a-z0-9]+)*(:[\w][\w.-]{0,127})?(@sha256:[0-9a-f]{64})?"
)
_MOST_CONFIG = 1_000_000  # bytes of a ConfigMap; Kubernetes takes 1 MiB, and the object's other fields need some


def check_name(name: str, kind: str) -> None:
    """Refuse a name that the operator or Kubernetes would refuse.

    Raises:
        InputError: it is longer than KubeRay allows, or is no DNS label as in RFC 1035.
    """
    if len(name) > (most := MOST_NAME[kind]):
        raise InputError(
            f"the name {shown(name, 70)} has {len(name)} characters, but that of a {kind} may have {most}, since the "
            "names of its pods are longer; give a shorter one with --name."
        )
    if not _LABEL.fullmatch(name):
        raise InputError(
            f"the name {shown(name)} is no DNS label (RFC 1035): lowercase letters, digits and '-', first a letter and "
            "last none of '-'; give another one with --name."
        )


def check_resource_name(name: str, option: str) -> None:
    """Refuse a name of a Secret, a claim or a queue that Kubernetes could not have.

    Raises:
        InputError: it is no DNS subdomain.
    """
    if len(name) > 253 or not _SUBDOMAIN.fullmatch(name):
        raise InputError(
            f"option '--{option}' is {shown(name)}, which no object of Kubernetes can be called; give lowercase "
            "letters, digits, '-' and '.'."
        )


def check_entrypoint(words: Sequence[str]) -> str:
    """The command of a RayJob, which the operator pastes into a shell without quoting it.

    Raises:
        InputError: a word holds a character that a shell reads, such as a quotation mark, `$` or `;`.
    """
    for word in words:
        if not word or shlex.quote(word) != word:
            raise InputError(
                f"the argument {shown(word)} holds a character that a shell reads, and KubeRay pastes the command of a "
                "job into a shell as it is; use letters, digits and any of '_@%+=:,./-'."
            )
    return " ".join(words)


def check_image(image: str) -> None:
    """Refuse what is no reference to an image.

    Raises:
        InputError: it is none.
    """
    if not _IMAGE.fullmatch(image):
        raise InputError(
            f"option '--image' is {shown(image, PATH_WIDTH)}, which names no image; write for example "
            "registry.example.com/team/distrec:0.1.0."
        )


def check_extras(mlflow: str | None, extras: Collection[str]) -> None:
    """Refuse a config that needs a package which the image of `Dockerfile` does not have.

    Args:
        mlflow: `tracking.mlflow` of the config.
        extras: packages that the user has added to the image.

    Raises:
        InputError: the config needs another one.
    """
    if mlflow is not None and "mlflow-skinny" not in extras:
        raise InputError(
            "key 'tracking.mlflow' is set, but the image has only the packages of the locks, and MLflow is none of "
            "them; install mlflow-skinny in your image and add --image-extra mlflow-skinny, or remove the key."
        )


def memory_bytes(text: str, option: str = "memory") -> int:
    """The bytes of a quantity of memory.

    Raises:
        InputError: it is no quantity of whole Mi, Gi or Ti, or too little for Ray and the packages.
    """
    found = _QUANTITY.fullmatch(text)
    if found is None:
        raise InputError(
            f"option '--{option}' is {shown(text)}, which is no quantity of memory; write a whole number with Mi, Gi "
            "or Ti, such as 8Gi."
        )
    count = int(found[1]) * _UNITS[found[2]]
    if count < _LEAST_MEMORY:
        raise InputError(
            f"option '--{option}' is {text}, but Ray and the packages alone need 1Gi in each pod; give more."
        )
    return count


def whole_cpus(cpus: float, key: str) -> int:
    """The CPUs of a worker's pod.

    Raises:
        InputError: they are no whole number: KubeRay rounds a pod's CPUs up for Ray, which could then start a second
            worker in the pod.
    """
    if cpus != int(cpus):
        raise InputError(
            f"key '{key}' is {cpus:g}, but KubeRay tells Ray a whole number of CPUs for a pod, so that more than one "
            "worker could start in it; give a whole number."
        )
    return int(cpus)


def check_config_size(texts: Mapping[str, str]) -> None:
    """Refuse configs that a ConfigMap cannot hold.

    Raises:
        InputError: they are larger together than Kubernetes allows.
    """
    if (size := sum(len(text.encode()) for text in texts.values())) > _MOST_CONFIG:
        raise InputError(
            f"the config has {size:,} bytes, but a ConfigMap holds at most {_MOST_CONFIG:,}; shorten it, or use "
            "'distrec submit'."
        )


def check_overlays(kind: str, overlays: Sequence[str], fixed: bool, places: Sequence[tuple[str, str]]) -> None:
    """Refuse overlays that contradict each other, the kind or the config.

    Args:
        kind: one of `KINDS`.
        overlays: names of overlays, as they were given.
        fixed: whether the number of worker pods is fixed.
        places: (what it is, path) of the folders and `s3://` prefixes that the verb reads or writes.

    Raises:
        InputError: names the first contradiction.
    """
    for name in overlays:
        if name not in OVERLAYS:
            raise InputError(f"overlay {shown(name)} does not exist; {nearest(name, list(OVERLAYS))}.")
        if overlays.count(name) > 1:
            raise InputError(f"overlay '{name}' is given twice; leave one out.")
        if kind == "Job" and name not in _OF_JOB:
            raise InputError(
                f"overlay '{name}' changes the pods of a Ray cluster, but a Job submits to a cluster that exists; use "
                "it where that cluster is made, or leave it out."
            )
    for pair, why in _EXCLUSIVE.items():
        if set(pair) <= set(overlays):
            raise InputError(f"overlays '{pair[0]}' and '{pair[1]}' contradict each other: {why}; leave one out.")
    if kind != "RayJob":
        return
    if "gpu" in overlays:
        raise InputError(
            "overlay 'gpu' reserves GPUs, but every verb runs on CPUs in this version, so they would be paid for and "
            "idle; leave it out, or make a cluster for your own work with --kind RayCluster."
        )
    if "autoscaling" in overlays and fixed:
        raise InputError(
            "overlay 'autoscaling' changes the number of workers, but only 'train' with a range of them can use that; "
            "give one, such as train.workers=[2,8], or leave the overlay out."
        )
    remote = [path.startswith(REMOTE) for _, path in places]
    if "s3" in overlays and not any(remote):
        raise InputError("overlay 's3' gives credentials of an object store, but no path is on s3://; leave it out.")
    if "pvc" in overlays and all(remote):
        raise InputError("overlay 'pvc' mounts a volume, but every path is on s3://; leave it out.")


def check_places(kind: str, overlays: Collection[str], mount: str, places: Sequence[tuple[str, str]]) -> None:
    """Refuse local paths that the pods of a job do not share. Relative ones have been refused before.

    Args:
        kind: one of `KINDS`.
        overlays: names of overlays.
        mount: where overlay `pvc` mounts its volume.
        places: (what it is, path) of the folders and `s3://` prefixes that the verb reads or writes.

    Raises:
        InputError: names the first path.
    """
    if kind != "RayJob":  # a cluster that exists may share any path
        return
    for what, path in places:
        if path.startswith(REMOTE):
            continue
        given = f"{what} is {shown(path, PATH_WIDTH)}"
        if "pvc" not in overlays:
            raise InputError(
                f"{given}, a folder that each pod would have for itself and lose at its end; give an s3:// URL, or add "
                f"--overlay pvc and a path below '{mount}'."
            )
        if ".." in PurePosixPath(path).parts or not PurePosixPath(path).is_relative_to(mount):
            raise InputError(
                f"{given}, which is not on the volume that overlay 'pvc' mounts at '{mount}'; give a path below it, or "
                "another --mount."
            )


def check_mount(mount: str) -> None:
    """Refuse a mount path that would hide parts of the image.

    Raises:
        InputError: it is no absolute path, or is one of the image's own folders.
    """
    path = PurePosixPath(mount)
    own = ("/", "/etc", "/home", "/opt", "/tmp", "/dev", "/usr", "/bin", "/lib", "/proc", "/sys", "/var")
    hidden = any(PurePosixPath(folder).is_relative_to(path) for folder in own)
    if not path.is_absolute() or ".." in path.parts or ":" in mount or hidden or not mount.isprintable():
        raise InputError(
            f"option '--mount' is {shown(mount, PATH_WIDTH)}, which is no absolute path, or would hide a folder of the "
            "image; give a folder of its own, such as /data."
        )


def check_readers(kind: str, overlays: Collection[str], given: Mapping[str, str | None]) -> None:
    """Refuse options that nothing reads, since they would be ignored silently.

    Args:
        kind: one of `KINDS`.
        overlays: names of overlays.
        given: the options of this verb by name; None for those that were not given.

    Raises:
        InputError: names the option.
    """
    for option, readers in _READERS.items():
        if given.get(option) is not None and not set(readers) & set(overlays):
            raise InputError(
                f"option '--{option}' is read by overlay {' or '.join(map(repr, readers))} only; add the overlay, or "
                "leave the option out."
            )
    if kind == "Job" and given.get("address") is None:
        raise InputError(
            "a Job submits to a cluster that exists; give its address, such as --address http://HEAD:8265."
        )
    for option in ("address",) if kind != "Job" else ("memory", "pods"):
        if given.get(option) is not None:
            raise InputError(f"option '--{option}' has no meaning for --kind {kind}; leave it out.")
