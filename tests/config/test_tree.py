from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from distrec.config import Section, apply_overrides, decode, load_file, nearest
from distrec.errors import InputError


class Inner(Section):
    rate: float = Field(0.1, gt=0)
    names: list[str] = Field(["a"])


class Maybe(Section):
    depth: int = 1


class Outer(Section):
    count: int
    inner: Inner = Inner()
    maybe: Maybe | None = None
    flag: bool = False


@given(
    st.recursive(
        st.dictionaries(st.text("abc", min_size=1, max_size=2), st.integers(), max_size=3),
        lambda inner: st.dictionaries(st.text("abc", min_size=1, max_size=2), inner, max_size=3),
        max_leaves=6,
    ),
    st.lists(st.text("xyz", min_size=1, max_size=2), min_size=1, max_size=3),
    st.integers(-(2**63), 2**63 - 1),
)
def test_an_override_sets_its_key_and_nothing_else(tree: dict[str, Any], path: list[str], value: int):
    before = repr(tree)
    out = apply_overrides(tree, [f"{'.'.join(path)}={value}"])
    assert repr(tree) == before, "the tree that was given is not touched"
    node = out
    for part in path[:-1]:
        node = node[part]
    assert node[path[-1]] == value
    assert {key: out[key] for key in tree} == tree


def test_the_last_override_wins_and_values_may_hold_equals_signs():
    assert apply_overrides({"a": {"b": 1}}, ["a.b=2", "a.b=3", "c=x=y"]) == {"a": {"b": 3}, "c": "x=y"}


@pytest.mark.parametrize(
    ("tree", "told"),
    [
        ({"count": 1, "iner": {}}, "unknown key 'at.iner'; did you mean 'inner'? (valid: count, flag, inner, maybe)."),
        ({"count": 1, "inner": {"rat": 1.0}}, "unknown key 'at.inner.rat'; did you mean 'rate'? (valid: names, rate)."),
        ({"count": 1, "maybe": {"depht": 1}}, "unknown key 'at.maybe.depht'; did you mean 'depth'? (valid: depth)."),
        ({"count": 1, "zzz": 1}, "unknown key 'at.zzz'; valid here: count, flag, inner, maybe."),
        ({}, "key 'at.count' is missing; add it."),
        ({"count": "1"}, "key 'at.count' is '1' but must be a valid integer."),
        ({"count": 1.0}, "key 'at.count' is 1.0 but must be a valid integer."),
        ({"count": True}, "key 'at.count' is True but must be a valid integer."),
        ({"count": 1, "inner": {"rate": 0}}, "key 'at.inner.rate' is 0 but must be greater than 0."),
        ({"count": 1, "inner": {"names": ["a", 2]}}, "key 'at.inner.names.1' is 2 but must be a string."),
        ({"count": 1, "inner": {"names": [None]}}, "key 'at.inner.names.0' is empty but must be a string."),
        ([1], "'at' must hold keys and values, not [1]."),
        ({"count": "y" * 999}, f"key 'at.count' is '{'y' * 59}…' but must be a valid integer."),
        ({"count": 1, "z" * 999: 1}, f"unknown key 'at.{'z' * 60}…'; valid here: count, flag, inner, maybe."),
        ({"count": 1, "flag": "yes"}, "key 'at.flag' is 'yes' but must be true or false."),
    ],
)
def test_a_wrong_tree_names_the_key_the_value_and_the_remedy(tree: Any, told: str):
    with pytest.raises(InputError) as error:
        decode(Outer, tree, "at")
    assert str(error.value) == told


def test_an_integer_is_a_number_where_a_float_is_asked():
    assert decode(Outer, {"count": 1, "inner": {"rate": 2}}).inner.rate == 2.0


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("epochs", "is not of the form key=value"),
        ("=3", "is not of the form key=value"),
        ("a.b=1", "'a' is a value, not a section; remove '.b'"),
        ("x=[1", "quote it"),
        (f"{'a.' * 40}a=1", "has more than 32 parts"),
    ],
)
def test_a_wrong_override_is_refused(override: str, told: str):
    with pytest.raises(InputError) as error:
        apply_overrides({"a": 1}, [override])
    assert f"override '{override[:50]}" in str(error.value)
    assert len(str(error.value)) < 250
    assert told in str(error.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: [1", "is not valid YAML"),
        ("- 1", "holds a list, not keys and values"),
        ("some words", "holds a text, not keys and values"),
        ("5", "holds a number, not keys and values"),
        ("a: 1\nb:\n  c: 1\n  c: 2\n", "key 'c' appears twice (line 4)"),
    ],
)
def test_a_wrong_file_is_refused_with_its_name(text: str, told: str, tmp_path: Path):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(InputError) as error:
        load_file(file)
    assert str(file) in str(error.value)
    assert told in str(error.value)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path):
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(InputError, match="cannot be read"):
            load_file(path)


def test_the_nearest_name_is_offered_only_where_one_is_near():
    assert nearest("lightgnc", ["alignrec", "lightgcn"]).startswith("did you mean 'lightgcn'?")
    assert nearest("q", ["alignrec", "lightgcn"]) == "valid here: alignrec, lightgcn"
