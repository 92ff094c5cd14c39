"""Values in manifests read back as themselves, whatever they are."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import UndefinedError

from distrec.config.text import plain_value
from distrec.kubernetes.templates import render, scalar


@settings(deadline=None)  # other processes may hold the cores
@given(st.text() | st.integers() | st.booleans())
def test_a_value_reads_back_as_itself(value: Any) -> None:
    written = scalar(value)
    assert "\n" not in written
    for line in (f"key: {written}", f"- {written}", f"{{a: {written}, b: 1}}", f"key: {written}  # reason"):
        read = yaml.safe_load(line)
        found = read[0] if isinstance(read, list) else read.get("key", read.get("a"))
        assert found == value
        assert type(found) is type(value)


@pytest.mark.parametrize(
    "text", ["1e3", "0x1F", "1_000", "12:30", "2026-01-01", "yes", "Off", "null", "~", "", "-", ".5", "1"]
)
def test_texts_that_some_parser_takes_for_something_else_have_quotation_marks(text: str) -> None:
    assert scalar(text) == f'"{text}"'


@pytest.mark.parametrize(
    "text", ["8Gi", "alignrec-demo", "/etc/distrec", "distrec train /etc/a.yaml", "s3://b/c", "a.b/c:1.0"]
)
def test_plain_texts_stay_plain(text: str) -> None:
    assert scalar(text) == text
    assert plain_value(text) == text


def test_a_template_without_a_value_fails() -> None:
    with pytest.raises(UndefinedError):
        render("network-policy.yaml", {"kind": "RayJob"})


def test_a_comment_stays_one_line() -> None:
    values = {"kind": "RayJob", "queue": "a"}
    text = render("overlays/kueue.yaml", values | {"kind": "Ray\nJob: {}"})
    assert text.startswith("# Kueue admits the Ray\\nJob: {} when")
