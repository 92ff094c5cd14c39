"""One function says what a path means, whichever key or option it comes from."""

import os
from pathlib import Path

import pytest

from distrec.config.paths import local_path, located
from distrec.data.storage import open_folder
from distrec.errors import InputError


def test_local_paths_are_absolute_and_know_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert located("x/../y") == str(tmp_path / "y")
    assert located("~") == str(tmp_path / "home")
    assert located("~/y") == str(tmp_path / "home" / "y")
    assert located(f"~{os.environ.get('USER', 'root')}/y").startswith("/")
    assert located("./~x/y") == str(tmp_path / "~x" / "y")
    assert located("a~b") == str(tmp_path / "a~b")
    assert located("./s3:/x") == str(tmp_path / "s3:" / "x")
    assert located("s3://bucket/~/x") == "s3://bucket/~/x"
    assert open_folder("~/y").path == local_path("~/y", "config file") == located("~/y")


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("memory://x", "is neither a local path nor an s3:// URL, and nothing else is supported"),
        ("http://host/x", "is neither a local path nor an s3:// URL"),
        ("gs://bucket/x", "is neither a local path nor an s3:// URL"),
        ("file:///x", "is neither a local path nor an s3:// URL"),
        ("S3://bucket/x", "is neither a local path nor an s3:// URL"),
        ("s3:/bucket/x", "is neither a local path nor an s3:// URL"),
        ("zip://a::s3://b", "is neither a local path nor an s3:// URL"),
        ("s3://", "has no bucket"),
        ("s3:///x", "has no bucket"),
        ("", "is empty"),
        (" ", "is empty"),
        ("a\0b", "holds a character"),
        ("a\udce9", "holds a character"),
        ("~nobody-of-that-name/x", "names a user that does not exist; for a folder of that name, write './~nobody-of-"),
    ],
)
def test_other_paths_are_refused(path: str, told: str):
    for opened in (lambda: located(path, "option '--out':"), lambda: open_folder(path)):
        with pytest.raises(InputError) as error:
            opened()
        assert told in str(error.value)
