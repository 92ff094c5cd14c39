"""What users write as YAML and JSON: values mean what they look like, bounds hold, and what is written reads back."""

import math
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from distrec.config import apply_overrides, load_file
from distrec.config.bounds import MOST_BYTES, MOST_DEPTH, MOST_VALUES
from distrec.config.text import read_json, read_yaml, write_yaml
from distrec.errors import InputError, first_few, shown

VALUES = [
    ("1e-3", 1e-3), ("1E5", 1e5), ("-2e+2", -200.0), ("1.5", 1.5), (".5", 0.5), ("5.", 5.0), ("7", 7), ("-3", -3),
    ("+12", 12), ("0", 0), ("-0", 0), ("0.0", 0.0), ("0x1F", 31), ("0o17", 15), ("01.5", 1.5),
    ("9223372036854775807", 2**63 - 1), ("-9223372036854775808", -(2**63)), ("1.7e308", 1.7e308),
    ("true", True), ("False", False), ("null", None), ("~", None), ("", None), (".inf", math.inf), ("-.inf", -math.inf),
    ("yes", "yes"), ("off", "off"), ("y", "y"), ("1:30", "1:30"), ("1_000", "1_000"), ("0b1", "0b1"), ("1e", "1e"),
    ("2021-01-01", "2021-01-01"), ("2021-01-01 10:00:00", "2021-01-01 10:00:00"), ("e5", "e5"), ("=", "="),
    ("<<", "<<"), ("recall@20", "recall@20"), ("s3://bucket/a", "s3://bucket/a"), ("'010'", "010"), ('"1e-3"', "1e-3"),
    ("[1e-1, 2]", [0.1, 2]), ("{a: 1, b: [x]}", {"a": 1, "b": ["x"]}), ("'{{ x }}'", "{{ x }}"), ("{x}", {"x": None}),
]  # fmt: skip


@pytest.mark.parametrize(("text", "value"), VALUES)
def test_numbers_and_words_read_as_they_look(text: str, value: Any, tmp_path: Path):
    file = tmp_path / "config.yaml"
    file.write_text(f"key: {text}\n")
    for found in (read_yaml(text, "here"), load_file(file)["key"], apply_overrides({}, [f"key={text}"])["key"]):
        assert found == value
        assert type(found) is type(value)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_float_survives_the_text_that_python_prints(value: float):
    assert read_yaml(repr(value), "here") == value


WORDS = [
    "010", "-08", "1:30", "yes", "on", "1e3", "1E400", "~", "null", "", "{{ x }}", "0x1F", "0o17", "1_000", "0b1", ".5",
    "2021-01-01", "<<", "=", ".inf", ".NaN", "true", "True", "9" * 50, "a: b", "# a", "- a", "&a", "*a", "!x", "a\nb",
    "---", "...", "%YAML", "@", "`", " a ", "\t", "'", '"', "é", "\u2028", "😀", "[", "{", "}", ",", "?", "|", ">",
]  # fmt: skip
TEXTS = st.sampled_from(WORDS) | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=9)
PLAIN = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | TEXTS
TREES = st.recursive(PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3))


@settings(deadline=None)
@given(TREES)
@example({word: [1] for word in WORDS})
@example([WORDS])
def test_what_is_written_reads_back(tree: Any):
    assert repr(read_yaml(write_yaml(tree), "here")) == repr(tree)


@pytest.mark.parametrize("word", WORDS)
def test_readers_of_yaml_1_1_read_the_same_strings(word: str):
    assert yaml.safe_load(write_yaml({"key": word})) == {"key": word}


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))
CHAIN = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 100))
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}], y: 1}}\n" for n in range(1, 40))
REFUSED = [
    (
        "x: {{ DATA }}",
        "a list or mapping is used as a key, as in a template {{ … }} that was not filled in; fill it in",
    ),
    ("? [a, b]\n: c", "a list or mapping is used as a key"),
    ("{a: b}: c", "a list or mapping is used as a key"),
    ("x: 1\nx: 2", "key 'x' appears twice (line 2)"),
    ("1: 2", "the key '1' is not a string; quote it"),
    ("true: 1", "the key 'true' is not a string"),
    ("~: 1", "the key '~' is not a string"),
    ("[" * 10_000, "nested more than 32 deep"),
    ("x: " + "[" * 40 + "]" * 40, "nested more than 32 deep"),
    ("- " * 10_000 + "a", "nested more than 32 deep"),
    (CHAIN, "nested more than 32 deep (line 31)"),
    (BOMB, "it holds more than 50,000 values, with every alias written out"),
    (MERGES, "it holds more than 50,000 values"),
    (f"[{'a,' * 60_000}]", "it holds more than 50,000 values"),
    ("x: &a [*a]", "the anchor 'a' contains itself"),
    ("x: &a {y: {z: *a}}", "the anchor 'a' contains itself"),
    ("x: &a {<<: *a}", "the anchor 'a' contains itself"),
    ("x: *a", "the alias *'a' has no anchor before it"),
    ("x: {<<: 3}", "the key '<<' merges mappings, and its value is something else"),
    ("x: {<<: [{a: 1}, 3]}", "the key '<<' merges mappings"),
    ("x: {<<: {a: 1}, <<: {b: 1}}", "key '<<' appears twice"),
    ("x: !!python/object/apply:os.system [ls]", "the tag 'tag:yaml.org,2002:python/object/apply:os.system' is not"),
    ("x: !!set {a, b}", "the tag 'tag:yaml.org,2002:set' is not supported; write the plain value"),
    ("x: !!binary aGk=", "is not supported"),
    ("x: !mine 3", "the tag '!mine' is not supported"),
    ("x: 1\n---\nx: 2", "it holds several documents"),
    ("x: 010", "the number '010' could mean 10 or an octal number; write it without leading zeros, or quote it"),
    ("x: -08", "the number '-08' could mean"),
    ("x: " + "9" * 5000, "is beyond 64 bits"),
    ("x: 0x" + "F" * 5000, "is beyond 64 bits"),
    ("x: 9223372036854775808", "the number '9223372036854775808' is beyond 64 bits"),
    ("x: 1e999", "the number '1e999' is beyond the range of float64"),
    ("x: -1e-999", "is beyond the range of float64"),
    ("x:\n\ty: 1", "is not valid YAML: found character '\\t' that cannot start any token (line 2)"),
    ("x: [1", "is not valid YAML"),
    ("x: a: b", "is not valid YAML: mapping values are not allowed here"),
    ('x: "a\\0b"', "a string holds the character '\\x00'"),
    ('x: "\\ud800"', "a string holds the character '\\ud800'"),
    ("x: \x01", "is not valid YAML: unacceptable character #x0001"),
    ("%YAML 2.0\n---\nx: 1", "is not valid YAML"),
]


@pytest.mark.parametrize(("text", "told"), REFUSED, ids=range(len(REFUSED)))
def test_what_could_be_misread_or_has_no_bound_is_refused(text: str, told: str, tmp_path: Path):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(InputError) as error:
        load_file(file)
    assert str(error.value).startswith(f"config file '{file}'")
    assert told in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


def test_an_override_is_refused_like_a_file():
    with pytest.raises(InputError, match=r"override 'data=\{\{ X \}\}': a list or mapping is used as a key"):
        apply_overrides({}, ["data={{ X }}"])
    with pytest.raises(InputError, match="override 'a=010': the number '010' could mean 10"):
        apply_overrides({}, ["a=010"])


def test_merge_keys_and_aliases_are_read():
    text = "a: &a {x: 1, y: 2}\nb: &b {y: 3}\nc: {<<: *a, y: 9}\nd: {<<: [*b, *a]}\ne: {z: {<<: *a}}\nf: [*a, *a]\n"
    tree = read_yaml(text, "here")
    assert (tree["c"], tree["d"], tree["e"]) == ({"x": 1, "y": 9}, {"x": 1, "y": 3}, {"z": {"x": 1, "y": 2}})
    assert tree["f"] == [{"x": 1, "y": 2}] * 2


def test_texts_within_the_bounds_are_read():
    deep = "[" * (MOST_DEPTH - 1) + "1" + "]" * (MOST_DEPTH - 1)
    assert repr(read_yaml(deep, "here")).count("[") == MOST_DEPTH - 1
    assert len(read_yaml(f"[{'1,' * (MOST_VALUES // 10)}]", "here")) == MOST_VALUES // 10


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("data: x\n".encode("utf-16"), "is UTF-16, not UTF-8; save it as UTF-8"),
        ("data: x\n".encode("utf-16-le"), "holds the character '\\x00', so it is no text in UTF-8"),
        ("a: 1\ndata: caf\u00e9\n".encode("latin-1"), "is not UTF-8 (byte 0xe9 in line 2); save it as UTF-8"),
        (b"data: x\0y\n", "holds the character '\\x00'"),
        (b"", "is empty; see configs/"),
        (b"# nothing\n", "is empty; see configs/"),
        (b"- 1\n", "holds a list, not keys and values"),
        (b"#" * (MOST_BYTES + 1), "is larger than 1,048,576 bytes"),
        (b"PK\x03\x04\x00\x00", "holds the character '\\x00'"),
    ],
)
def test_a_file_that_is_no_config_is_refused(content: bytes, told: str, tmp_path: Path):
    file = tmp_path / "bad.yaml"
    file.write_bytes(content)
    with pytest.raises(InputError) as error:
        load_file(file)
    assert f"config file '{file}' {told}" in str(error.value)


def test_what_is_no_file_is_refused(tmp_path: Path):
    loop, pipe = tmp_path / "loop", tmp_path / "pipe"
    loop.symlink_to(loop)
    os.mkfifo(pipe)
    for path, told in (
        (tmp_path / "none.yaml", "cannot be read (No such file or directory)"),
        (tmp_path, "cannot be read (Is a directory)"),
        (loop, "cannot be read (Too many levels of symbolic links)"),
        ("/dev/zero", "is a device"),
        ("/dev/null", "is a device"),
        (pipe, "is empty"),  # nobody writes to it
        ("s3://bucket/a.yaml", "must be on a local disk"),
        ("http://host/a.yaml", "is neither a local path nor an s3:// URL"),
        ("~nobody-of-that-name/a.yaml", "names a user that does not exist"),
        ("a\0b", "holds a character that is not UTF-8"),
        ("", "is empty; give"),
    ):
        with pytest.raises(InputError) as error:
            load_file(path)
        assert told in str(error.value)


def test_a_byte_order_mark_a_pipe_and_the_home_folder_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a.yaml").write_bytes("\ufeffx: é\n".encode())
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_file("~/a.yaml") == {"x": "é"}
    reader, writer = os.pipe()
    os.write(writer, b"x: 1\n")
    os.close(writer)
    try:
        assert load_file(f"/dev/fd/{reader}") == {"x": 1}  # as in a shell's <(command)
    finally:
        os.close(reader)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "is not valid JSON: Expecting property name"),
        ("[" * 100_000, "it is nested more than 32 deep"),
        ("[" * 40 + "]" * 40, "it is nested more than 32 deep"),
        ("[NaN]", "the number NaN is not finite"),
        ("[1e999]", "a number is beyond the range of float64"),
        ("9" * 5000, "Exceeds the limit"),
        (b"\xff\xfe{\0}\0", "is UTF-16"),
        ('{"\\ud800": 1}', "a string holds the character '\\ud800'"),
        ('["a\\u0000"]', "a string holds the character '\\x00'"),
        ("", "Expecting value"),
    ],
)
def test_bad_json_is_refused(text: str | bytes, told: str):
    with pytest.raises(InputError) as error:
        read_json(text, "file 'a.json'")
    assert told in str(error.value)
    assert str(error.value).startswith("file 'a.json' ")


def test_json_is_read():
    assert read_json(b'{"a": [1, 2.5, null, "\xc3\xa9"]}', "here") == {"a": [1, 2.5, None, "é"]}


def test_the_caller_says_what_to_do_about_bad_json():
    for text, told in ((b"{", "is not valid JSON: Expecting"), (b"\x80", "is not UTF-8 (byte 0x80 in line 1)")):
        with pytest.raises(InputError) as error:
            read_json(text, "file 'a.json'", "restore it")
        assert str(error.value).startswith(f"file 'a.json' {told}")
        assert str(error.value).endswith("; restore it.")


@pytest.mark.parametrize("width", [20, 60])
@pytest.mark.parametrize("quoted", [True, False])
def test_a_value_in_a_message_is_one_short_line(width: int, quoted: bool):
    for value in ("a", "a" * 500, "a\nb", "it's", "é\u200b", 7, [1, "a" * 500], 10**5000, None):
        text = shown(value, width, quoted)
        assert text.isprintable()
        assert len(text) <= width + 10
    assert shown("a\nb") == r"'a\nb'"
    assert shown("it's\n", quoted=False) == r"it's\n"
    assert shown("a" * 500, width, quoted=False) == "a" * width + "…"


def test_the_first_few_of_many_words():
    assert first_few("abc", 3) == "a, b, c"
    assert first_few("abcd", 4) == first_few(iter("abc"), 4) == "a, b, c, …"
    assert first_few("abcd", 4, most=1) == "a, …"
    assert first_few("", 0) == ""
