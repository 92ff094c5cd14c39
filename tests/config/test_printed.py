"""The output of --print-config: the same config, with descriptions as comments."""

import string
from pathlib import Path
from typing import Any

import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import Field

from distrec.config import Section, commented, decode, load_file

LONG = (
    "numbers whose description is so long that it cannot stand in one line with a key and a value, "
    "even if that is short"
)


class Leaf(Section):
    rate: float = Field(0.5, description="share of rows, in [0, 1]")
    depth: int | None = Field(None, description=LONG)


class Whole(Section):
    plain: str = Field("", description="any text")
    leaf: Leaf = Field(Leaf(), description="one section")
    maybe: Leaf | None = Field(None, description="a section or null")
    listed: list[Leaf] = Field([], description="sections in a list")
    named: dict[str, Leaf] = Field({}, description="sections by name")
    values: dict[str, Any] = Field({}, description="values by key")
    numbers: list[int] = Field([], description="whole numbers")
    opaque: dict[str, Any] = Field({}, description="a section of a kind that is known later")
    bare: int = 0


def read_back(shown: str, folder: Path) -> dict[str, Any]:
    file = folder / "shown.yaml"
    file.write_text(shown)
    return load_file(file)


def test_comments_follow_values_or_precede_them():
    whole = Whole(
        plain="a", leaf=Leaf(rate=1e-5), listed=[Leaf(), Leaf(depth=3)], named={"x": Leaf(), "y.z": Leaf()},
        values={"optimizer.lr": {"low": 1e-4, "high": 1e-2}, "ks": [1, 2]}, numbers=[5, 10], opaque={"rate": 0.1},
    )  # fmt: skip
    assert commented(whole, opaque=Leaf) == (
        "plain: a  # any text\n"
        "leaf:  # one section\n"
        "  rate: 1.0e-05  # share of rows, in [0, 1]\n"
        f"  # {LONG}\n"
        "  depth: null\n"
        "maybe: null  # a section or null\n"
        "listed:  # sections in a list\n"
        "- rate: 0.5  # share of rows, in [0, 1]\n"
        f"  # {LONG}\n"
        "  depth: null\n"
        "- rate: 0.5\n"
        "  depth: 3\n"
        "named:  # sections by name\n"
        "  x:\n"
        "    rate: 0.5  # share of rows, in [0, 1]\n"
        f"    # {LONG.removesuffix(' short')}\n"
        "    # short\n"
        "    depth: null\n"
        "  y.z:\n"
        "    rate: 0.5\n"
        "    depth: null\n"
        "values:  # values by key\n"
        "  optimizer.lr: {low: 0.0001, high: 0.01}\n"
        "  ks: [1, 2]\n"
        "numbers: [5, 10]  # whole numbers\n"
        "opaque:  # a section of a kind that is known later\n"
        "  rate: 0.1  # share of rows, in [0, 1]\n"
        "bare: 0\n"
    )


def test_lines_end_within_120_columns():
    whole = Whole(plain="x" * 100, numbers=list(range(100)), values={"ks": list(range(60)), "k": {"a": "b"}})
    assert max(map(len, commented(whole).splitlines())) <= 120
    assert yaml.safe_load(commented(whole)) == whole.model_dump()


TEXTS = st.text(st.sampled_from(string.printable + "ü—"), max_size=30)


@settings(deadline=None)  # other processes may hold the cores
@given(TEXTS, st.lists(TEXTS, max_size=3), st.floats(allow_nan=False, allow_infinity=False), TEXTS)
@example("a:\nb", [" " * 130, "\n"], 1e16, "a: b")
@example("1e-3", ["1e5", "yes", "~", "null"], 1e-05, "2e3")
@example("a # b", ["# a", "- a", "{a}", "a  "], -0.0, "# a")
def test_any_text_and_number_reads_back(tmp_path_factory: Any, plain: str, more: list[str], number: float, key: str):
    same = [number, *more]
    whole = Whole(plain=plain, values={key: same, "b": same, "c": {key: plain}}, maybe=Leaf(rate=number))
    tree = read_back(commented(whole), tmp_path_factory.getbasetemp())
    assert decode(Whole, tree) == whole
