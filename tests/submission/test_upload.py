"""What a job gets of the working directory: exactly what Ray packs, and never what it must not."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import create_package

from distrec.errors import InputError
from distrec.submission import upload
from distrec.submission.upload import Upload, pattern, size


def write(folder: Path, *names: str, text: str = "x") -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            path.mkdir(exist_ok=True)
        else:
            path.write_text(text)


def ray_package(sent: Upload, target: Path) -> tuple[dict[str, int], int]:
    """Bytes by name in the package that Ray makes of the folder with these excludes, and the package's size."""
    excludes = [*get_runtime_env_default_excludes(), *sent.excludes]
    create_package(str(sent.folder), target, include_gitignore=True, excludes=excludes)
    with zipfile.ZipFile(target) as package:
        return {entry.filename: entry.file_size for entry in package.infolist()}, target.stat().st_size


NAMES = st.sampled_from([
    "a", "b.py", "build", "data", "runs", "run.json", "config.yaml", "manifest.json", "interactions", "sweep.json",
    "sweep.yaml", "pyvenv.cfg", ".git", ".venv", "w.safetensors", "x.parquet", "[a]", "a b", "b*", "c?", "!d", "#e",
    "ä", "back\\slash", "trailing ", ".env", "d.egg-info", "complete.json",
])  # fmt: skip
PATHS = st.lists(NAMES, min_size=1, max_size=4).map("/".join)
IGNORES = st.lists(st.sampled_from(["a", "/data/", "*.py", "!b.py", "runs/", "a b", "# note", "", "b/**/a"]))


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(PATHS, max_size=12), st.dictionaries(st.sampled_from(["", "a", "runs/data"]), IGNORES, max_size=2))
def test_what_is_counted_is_what_ray_packs(paths: list[str], ignores: dict[str, list[str]]) -> None:
    with TemporaryDirectory() as place:
        folder = Path(place) / "work"
        folder.mkdir()
        for path in paths:
            target = folder / path
            if not any(parent.is_file() for parent in target.parents) and not target.exists():
                write(folder, path, text=path)
        for where, lines in ignores.items():
            if (folder / where).is_dir():
                (folder / where / ".gitignore").write_text("\n".join(lines))
        sent = Upload.of(folder)
        packed, whole = ray_package(sent, Path(place) / "package.zip")
        assert sent.files == packed
        assert sent.bytes == whole


def test_what_no_job_needs_is_left_out(tmp_path: Path) -> None:
    write(
        tmp_path, "jobs/train.py", "configs/x.yaml", "distrec/cli.py", "src/build/code.py",
        "environments/mine/pyvenv.cfg", "environments/mine/lib/a.py", "conda/conda-meta/history",
        "out/r/run.json", "out/r/config.yaml", "out/r/checkpoints/1/w.bin", "s/sweep.json", "s/sweep.yaml",
        "saved/complete.json", "saved/w.bin", "d/manifest.json", "d/interactions/a.bin",
        "build/x", ".git/HEAD", ".venv/bin/python", "distrec/__pycache__/a.pyc", "w.safetensors", "deep/x.parquet",
        "distrec.egg-info/x", ".env", ".aws/credentials", "key.pem",
        "only/manifest.json", "only/run.json",  # not what they look like
    )  # fmt: skip
    (tmp_path / ".gitignore").write_text("ignored\n")
    (tmp_path / ".rayignore").write_text("/heavy/\n")
    write(tmp_path, "ignored/x", "heavy/x")
    sent = Upload.of(tmp_path)
    assert set(sent.files) == {
        "jobs/train.py", "configs/x.yaml", "distrec/cli.py", "src/build/code.py", "only/manifest.json",
        "only/run.json", ".gitignore", ".rayignore",
    }  # fmt: skip
    assert sent.left_out == {"environment": 2, "run": 2, "sweep": 1, "prepared dataset": 1}
    assert "left out: " in sent.told()
    assert "2 environments" in sent.told()


def test_a_working_folder_inside_a_run_is_sent(tmp_path: Path) -> None:
    write(tmp_path, "run.json", "config.yaml", "jobs/train.py")
    assert "jobs/train.py" in Upload.of(tmp_path).files


def test_links_are_followed_as_ray_does(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere", "x.yaml")
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "configs").symlink_to(tmp_path / "elsewhere")
    (folder / "dangling").symlink_to(tmp_path / "nothing")
    sent = Upload.of(folder)
    assert sent.files == {"configs/x.yaml": 1} == ray_package(sent, tmp_path / "package.zip")[0]
    sent.require("configs/x.yaml", "config file")


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("configs/absent.yaml", "config file 'configs/absent.yaml' does not exist in the working folder"),
        ("../x.yaml", "is outside the working folder"),
        ("/x.yaml", "is outside the working folder"),
        ("{}/configs/x.yaml", "is absolute, and the job has its own copy elsewhere; write 'configs/x.yaml'."),
        ("ignored/x.yaml", "is not part of the upload: a .gitignore or .rayignore"),
        ("build/x.yaml", "is not part of the upload"),
    ],
)
def test_a_file_that_the_job_would_not_have_is_refused(path: str, told: str, tmp_path: Path) -> None:
    write(tmp_path, "configs/x.yaml", "ignored/x.yaml", "build/x.yaml")
    (tmp_path / ".gitignore").write_text("ignored\n")
    with pytest.raises(InputError) as error:
        Upload.of(tmp_path).require(path.format(tmp_path), "config file")
    assert told in str(error.value)


def test_files_of_the_working_folder_may_be_named_in_other_ways(tmp_path: Path) -> None:
    write(tmp_path, "configs/x.yaml")
    sent = Upload.of(tmp_path)
    for path in ("configs/x.yaml", "./configs/x.yaml", "configs/../configs/x.yaml"):
        sent.require(path, "config file")


def test_a_large_upload_is_refused_with_its_largest_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload, "most_bytes", lambda: 10_000)
    for number in range(8):
        write(tmp_path, f"part{number}", text="x" * 1000 * number)
    with pytest.raises(InputError) as error:
        Upload.of(tmp_path).require_size()
    told = str(error.value)
    assert "the cluster takes at most 9.8 KiB" in told
    assert told.index("'part7' (6.8 KiB)") < told.index("'part6'") < told.index("'part3'")
    assert "'part2'" not in told
    assert ".rayignore" in told
    (tmp_path / ".rayignore").write_text("part[2-7]\n")
    Upload.of(tmp_path).require_size()


def test_names_that_cannot_be_sent_are_refused(tmp_path: Path) -> None:
    with open(os.path.join(os.fsencode(tmp_path), b"\xff.yaml"), "wb"):
        pass
    with pytest.raises(InputError, match=r"cannot be sent, since its name is not UTF-8"):
        Upload.of(tmp_path)


def test_patterns_and_sizes_for_people() -> None:
    assert pattern("a [b]*?\\") == "/a[ ]\\[b\\]\\*\\?\\\\"
    assert [size(n) for n in (0, 1023, 1024, 5 * 2**20, 3 * 2**30)] == [
        "0 bytes", "1023 bytes", "1.0 KiB", "5.0 MiB", "3.0 GiB",
    ]  # fmt: skip
