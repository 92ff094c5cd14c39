"""The documents stay correct: every block of commands in README.md and docs/ runs, in the order of the page."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.documents import PAGES, ROOT, blocks

TRAINING = re.compile(r"^(distrec train (?!.*--print-config).*)$", re.MULTILINE)
EPOCHS = 2  # each training is cut to this length; the page's config may have hundreds of epochs


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like the root of an installed repository."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("configs", "jobs", "benchmarks", "tests", "README.md"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "build").mkdir()
    return folder


@pytest.mark.parametrize("page", PAGES)
def test_blocks_are_of_known_kinds_and_files_are_valid(page: str) -> None:
    for block in blocks((ROOT / page).read_text()):
        where = f"{page}, line {block.line}"
        assert block.language in ("bash", "python", "yaml", "json", "text", ""), where
        assert set(block.words) <= {"not-run", "fragment"}, where
        if block.language == "yaml":
            yaml.safe_load(block.text)
        if block.language == "bash":
            assert not re.search(r"^\s*[$>] ", block.text, re.MULTILINE), (
                f"{where}: remove the prompt, so that readers can paste the command"
            )


@pytest.mark.multiprocess
@pytest.mark.parametrize("page", PAGES)
def test_commands_of_a_page_run_as_written(page: str, clone: Path) -> None:
    """Trainings are shortened; nothing else is changed."""
    environment = {
        **os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HOME": str(clone),
        "OMP_NUM_THREADS": "1", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    }  # fmt: skip
    environment.pop("RAY_ADDRESS", None)
    for block in blocks((ROOT / page).read_text()):
        if block.language == "yaml" and block.file is not None:
            (clone / block.file).parent.mkdir(parents=True, exist_ok=True)
            (clone / block.file).write_text(block.text)
        if not block.runs:
            continue
        text = TRAINING.sub(rf"\1 train.epochs={EPOCHS}", block.text)
        command = ["bash", "-euo", "pipefail", "-c", text] if block.language == "bash" else [sys.executable, "-c", text]
        done = subprocess.run(
            command, cwd=clone, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, f"{page}, line {block.line}:\n{text}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"


def test_blocks_are_found_with_their_kind_and_file(tmp_path: Path) -> None:
    text = (
        "text\n```bash\ntrue\n```\n\n```bash not-run\nfalse\n```\n```yaml\n# a/b.yaml\nkey: 1\n```\n```\ndrawing\n```\n"
    )
    found = blocks(text)
    assert [(block.line, block.language, block.runs) for block in found] == [
        (2, "bash", True), (6, "bash", False), (9, "yaml", False), (13, "", False),
    ]  # fmt: skip
    assert found[2].file == "a/b.yaml"
    assert TRAINING.sub(r"\1 x=1", "distrec train a b=1\ndistrec train a --print-config\n") == (
        "distrec train a b=1 x=1\ndistrec train a --print-config\n"
    )
