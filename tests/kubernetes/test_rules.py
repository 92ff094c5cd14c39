"""Bad input of `distrec manifest`: one sentence with place, value and remedy, status 2, and nothing written."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distrec.cli import main
from distrec.errors import InputError
from distrec.kubernetes.rules import (
    KINDS,
    OVERLAYS,
    check_config_size,
    check_entrypoint,
    check_image,
    check_name,
    memory_bytes,
)
from tests.kubernetes.rendered import ROOT, TRAIN

RANGE = (*TRAIN, "train.workers=[2,4]")
ENCODE = ("encode", "s3://bucket/data")
SWEEP = ("tune", "configs/sweeps/demo.yaml", "data=s3://bucket/data", "run.storage=s3://bucket/sweeps")
LOCAL = (*TRAIN[:2], "data=/data/shop", "run.storage=/data/runs")
ADDRESS = ("--kind", "Job", "--address", "http://head:8265")


def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path, *arguments: str) -> str:
    """What a command that must be refused says."""
    out = tmp_path / "out"
    assert main(["manifest", *arguments, "--out", str(out)]) == 2
    assert not out.exists()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("distrec manifest: ")
    assert line.endswith(".")
    return line


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


MEMORY = ("--memory", "8Gi")
BAD = [
    # names
    ((*TRAIN, *MEMORY, "--name", "a" * 48), "has 48 characters, but that of a RayJob may have 47"),
    ((*TRAIN, *MEMORY, "--name", "Mine"), "'Mine' is no DNS label"),
    ((*TRAIN, *MEMORY, "--name", "1st"), "'1st' is no DNS label"),
    ((*TRAIN, *MEMORY, "run.name=my_run"), "'my_run' is no DNS label .*--name"),
    ((*TRAIN, *MEMORY, "--overlay", "s3", "--secret", "Keys!"), "'--secret' is 'Keys!'"),
    ((*TRAIN, *MEMORY, "--overlay", "kueue", "--queue", "a_b"), "'--queue' is 'a_b'"),
    # the command, which the operator pastes into a shell
    (("encode", "s3://bucket/a b"), "'s3://bucket/a b' holds a character that a shell reads"),
    (("encode", "s3://bucket/$(id)"), "holds a character that a shell reads"),
    (("encode", "s3://bucket/a;id"), "holds a character that a shell reads"),
    (("encode", "s3://bucket/it's"), "holds a character that a shell reads"),
    # resources
    ((*TRAIN, "--memory", "8GB"), "'--memory' is '8GB', which is no quantity"),
    ((*TRAIN, "--memory", "1.5Gi"), "'--memory' is '1.5Gi', which is no quantity"),
    ((*TRAIN, "--memory", "0Gi"), "'--memory' is '0Gi', which is no quantity"),
    ((*TRAIN, "--memory", "512Mi"), "'--memory' is 512Mi, but Ray and the packages alone need 1Gi"),
    ((*TRAIN, *MEMORY, "train.cpus_per_worker=0.5"), "'train.cpus_per_worker' is 0.5, but KubeRay"),
    ((*SWEEP, *MEMORY, "resources.cpus_per_worker=1.5"), "'resources.cpus_per_worker' is 1.5, but KubeRay"),
    ((*TRAIN, *MEMORY, "train.workers=0"), "'train.workers' is 0, which trains in the driver"),
    ((*ENCODE, "--workers", "0"), "'--workers' is 0"),
    ((*SWEEP, *MEMORY, "--pods", "0"), "'--pods' is 0"),
    ((*SWEEP, *MEMORY, "resources.workers=3", "--pods", "2"), "'--pods' is 2, but a trial has 3 workers"),
    ((*TRAIN, *MEMORY, "--pods", "2"), "'--pods' is for 'tune'"),
    # overlays
    ((*TRAIN, *MEMORY, "--overlay", "autoscale"), "overlay 'autoscale' does not exist; .*autoscaling"),
    ((*TRAIN, *MEMORY, "--overlay", "gpu"), "overlay 'gpu' reserves GPUs, but every verb runs on CPUs"),
    ((*TRAIN, *MEMORY, "--overlay", "kueue", "--overlay", "volcano"), "'kueue' and 'volcano' contradict"),
    ((*RANGE, *MEMORY, "--overlay", "autoscaling", "--overlay", "kueue"), "'kueue' and 'autoscaling' contradict"),
    ((*TRAIN, *MEMORY, "--kind", "RayCluster", "--overlay", "cpu", "--overlay", "gpu"), "'cpu' and 'gpu' contradict"),
    ((*TRAIN, *MEMORY, "--overlay", "autoscaling"), "'autoscaling' changes the number of workers, but"),
    ((*SWEEP, *MEMORY, "--overlay", "autoscaling"), "'autoscaling' changes the number of workers, but"),
    ((*ENCODE, "--overlay", "autoscaling"), "'autoscaling' changes the number of workers, but"),
    ((*LOCAL, *MEMORY, "--overlay", "pvc", "--overlay", "s3"), "overlay 's3' gives credentials .* but no path"),
    ((*TRAIN, *MEMORY, "--overlay", "pvc"), "overlay 'pvc' mounts a volume, but every path is on s3://"),
    ((*TRAIN, *MEMORY, "--overlay", "s3", "--overlay", "s3"), "overlay 's3' is given twice"),
    ((*TRAIN, *ADDRESS, "--overlay", "s3"), "overlay 's3' changes the pods of a Ray cluster"),
    # options that nothing would read
    ((*TRAIN, *MEMORY, "--queue", "a"), "'--queue' is read by overlay 'kueue' or 'volcano' only"),
    ((*TRAIN, *MEMORY, "--mount", "/data"), "'--mount' is read by overlay 'pvc' only"),
    ((*TRAIN, *MEMORY, "--address", "http://a"), "'--address' has no meaning for --kind RayJob"),
    ((*TRAIN, *ADDRESS, *MEMORY), "'--memory' has no meaning for --kind Job"),
    ((*TRAIN, "--kind", "Job"), "give its address"),
    ((*TRAIN, "--kind", "Job", "--address", "http://user:word@head:8265"), "holds credentials"),
    # storage that pods do not share
    ((*TRAIN[:2], *MEMORY), "'build/demo/data', a relative path"),
    ((*LOCAL, *MEMORY), "key 'data' is '/data/shop', a folder that each pod would have for itself"),
    ((*LOCAL, *MEMORY, "--overlay", "pvc", "--mount", "/other"), "'/data/shop', which is not on the volume"),
    ((*LOCAL, *MEMORY, "--overlay", "pvc", "data=/data/../etc"), "'/data/../etc', which is not on the volume"),
    ((*LOCAL, *MEMORY, "--overlay", "pvc", "data=/database"), "'/database', which is not on the volume"),
    ((*LOCAL, *MEMORY, "--overlay", "pvc", "run.graphs=/graphs"), "'/graphs', which is not on the volume"),
    ((*LOCAL, *MEMORY, "--overlay", "pvc", "--mount", "/home"), "'--mount' is '/home'"),
    ((*LOCAL, *MEMORY, "--overlay", "pvc", "--mount", "data"), "'--mount' is 'data'"),
    # the image
    ((*TRAIN, *MEMORY, "tracking.mlflow=http://mlflow"), "'tracking.mlflow' is set, but the image"),
    ((*SWEEP, *MEMORY, "tracking.mlflow=http://mlflow"), "'tracking.mlflow' is set, but the image"),
    ((*TRAIN, *MEMORY, "--image", "My Image"), "'--image' is 'My Image', which names no image"),
    # the verb and its config
    (("evaluate", "s3://bucket/runs/a"), "'evaluate' is no verb with a manifest"),
    (("submit", "train", "a"), "'submit' is no verb that a job can run"),
    ((*TRAIN, *MEMORY, "train.epoch=3"), "train.epoch"),
    ((*SWEEP, *MEMORY, "metric=recall@7"), "'evaluate.ks'"),
    (("train", "configs/none.yaml", *MEMORY), "configs/none.yaml"),
    ((*TRAIN, *MEMORY, "data=s3://user:word@bucket/data"), "URL with credentials"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=lambda value: value if isinstance(value, str) else "")
def test_bad_input_is_one_sentence(
    arguments: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert re.search(message, refused(capsys, tmp_path, *arguments))


def test_the_help_names_every_overlay_and_kind(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["manifest", "--help"])
    text = capsys.readouterr().out
    assert all(re.search(rf"\b{name}\b", text) for name in (*OVERLAYS, *KINDS))


def test_secrets_of_the_shell_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "an-example-of-a-secret")
    line = refused(capsys, tmp_path, *TRAIN, "run.name=an-example-of-a-secret", "--memory", "8Gi")
    assert "AWS_SECRET_ACCESS_KEY" in line
    assert "an-example" not in line


def test_an_image_with_the_extra_package_is_taken(tmp_path: Path) -> None:
    arguments = [
        "manifest",
        *TRAIN,
        "--memory",
        "8Gi",
        "tracking.mlflow=http://mlflow",
        "--image-extra",
        "mlflow-skinny",
    ]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize("name", ["a", "run-1", "a" * 47])
def test_good_names_pass(name: str) -> None:
    check_name(name, "RayJob")


@pytest.mark.parametrize("name", ["", "-a", "a-", "a.b", "a\n", "é", "A"])
def test_bad_names_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="no DNS label"):
        check_name(name, "RayJob")


@settings(deadline=None)  # other processes may hold the cores
@given(st.lists(st.text(min_size=1), min_size=1, max_size=4))
def test_an_entrypoint_reads_as_the_same_words_in_a_shell(words: list[str]) -> None:
    try:
        entrypoint = check_entrypoint(words)
    except InputError:
        return
    assert shlex.split(entrypoint) == words
    assert not re.search(r"[\"'`$;&|<>(){}\\*?!#~\s]", "".join(words))


@pytest.mark.parametrize(
    "image", ["distrec", "distrec:0.1.0", "a.example.com:5000/team/distrec:v1", f"a.b/c@sha256:{'0' * 64}"]
)
def test_good_images_pass(image: str) -> None:
    check_image(image)


@pytest.mark.parametrize("image", ["", "a b", "Upper/case", "a:b:c", "https://a/b", "a/b:", "a\n", "--privileged"])
def test_bad_images_are_refused(image: str) -> None:
    with pytest.raises(InputError, match="names no image"):
        check_image(image)


def test_quantities_are_bytes() -> None:
    assert memory_bytes("1Ti") == 2**40
    assert memory_bytes("1536Mi") == 3 * 2**29


def test_a_config_that_no_config_map_holds_is_refused() -> None:
    check_config_size({"a": "x" * 500_000, "b": "x" * 500_000})
    with pytest.raises(InputError, match="1,000,002 bytes"):
        check_config_size({"a": "x" * 500_000, "b": "é" * 250_001})
