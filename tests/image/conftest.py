"""One image for all its tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.image.build import Image, lack, remove


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    """The image of `Dockerfile`, which the tests of this folder share with one container of it."""
    if missing := lack():
        pytest.skip(missing)
    folder = tmp_path_factory.mktemp("image")
    try:
        yield Image(folder, os.environ.get("TORCH", "torch==2.13.0"))
    finally:
        remove(folder)
