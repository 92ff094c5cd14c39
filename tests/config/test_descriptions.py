"""Every field of every config section has a description of one phrase."""

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import pytest
from pydantic import Field

from distrec.config import Section

REPOSITORY = Path(__file__).resolve().parents[2]
LONGEST = 120
"""Characters, so that a description takes one line, or two where it is indented."""
FILLERS = {"a", "an", "the", "of", "this", "its"}


def shipped() -> list[type[Section]]:
    """Every section that distrec defines, in any module."""
    for path in sorted((REPOSITORY / "distrec").rglob("*.py")):
        if re.search(r"^ *class \w+\(.*(Section|Config)\):", path.read_text(encoding="utf-8"), re.M):
            importlib.import_module(".".join(path.relative_to(REPOSITORY).with_suffix("").parts))
    return [kind for kind in _below(Section) if kind.__module__.startswith("distrec.")]


def _below(kind: type[Section]) -> Iterator[type[Section]]:
    for child in kind.__subclasses__():
        yield child
        yield from _below(child)


def choices(annotation: Any) -> list[Any]:
    """The values of the literal types in an annotation."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [value for part in get_args(annotation) for value in choices(part)]


def complaints(kind: type[Section]) -> list[str]:
    """What is wrong with the descriptions of a section's fields."""
    found = []
    for name, field in kind.model_fields.items():
        said = field.description or ""
        words = set(re.findall(r"[a-z0-9]+", said.lower())) - FILLERS - set(name.lower().split("_"))
        first = said.partition(" ")[0]
        faults = {
            "has no description": not said,
            "ends or breaks off like a sentence": said[-1:] in list(".!?:;,") or bool(re.search(r"\. \w", said)),
            "has space around it or is more than a line": said != " ".join(said.split()),
            f"is longer than {LONGEST} characters": len(said) > LONGEST,
            "begins with a capital letter": bool(re.fullmatch(r"A|[A-Z][a-z]+", first)),
            "only repeats the field's name": not words,
            "leaves out a choice": any(
                not re.search(rf"\b{re.escape(str(c))}", said) for c in choices(field.annotation)
            ),
        }
        found += [f"{kind.__module__}.{kind.__qualname__}.{name} {fault}" for fault, here in faults.items() if here]
    return found


def test_every_section_is_found():
    names = {f"{kind.__module__.removeprefix('distrec.')}.{kind.__qualname__}" for kind in shipped()}
    for expected in (
        "config.run.TrainSection", "tuning.sweep.SweepConfig", "tuning.space.Range", "methods.bivrec.BiVRec.Config",
        "methods.popularity.Popularity.Config", "data.prepare.DataConfig", "data.splits.SplitSection",
        "data.manifest.Manifest", "data.importers.tables.ItemsTable", "data.importers.mmrec.Config",
        "data.importers.recbole.Config",
    ):  # fmt: skip
        assert expected in names


def test_every_field_has_a_description():
    assert [line for kind in shipped() for line in complaints(kind)] == []


def test_every_whole_number_has_a_largest_value():
    """A size without a bound ends in an allocation error; manifests are checked where datasets are opened."""
    unbounded = [
        f"{kind.__module__}.{kind.__qualname__}.{name}"
        for kind in shipped()
        if kind.__module__ not in ("distrec.data.dataset", "distrec.data.manifest")
        for name, field in kind.model_fields.items()
        if field.annotation in (int, int | None)
        and not any(getattr(limit, "le", None) or getattr(limit, "lt", None) for limit in field.metadata)
    ]
    assert unbounded == []


@pytest.mark.parametrize(
    ("field", "description", "fault"),
    [
        (int, None, "has no description"),
        (int, "", "has no description"),
        (int, "largest number of epochs.", "ends or breaks off"),
        (int, "number of epochs. None by default", "ends or breaks off"),
        (int, "number of epochs\nof a run", "more than a line"),
        (int, "number of epochs " * 8 + "in all", "is longer than"),
        (int, "The number of epochs in all", "begins with a capital"),
        (int, "the planted field", "only repeats"),
        (Literal["first", "last"] | None, "which row stays: first, or the other", "leaves out a choice"),
        (Annotated[list[Literal[1, 2]], "a note"], "numbers of first layers, 1", "leaves out a choice"),
    ],
)
def test_a_planted_field_is_caught(field: Any, description: str | None, fault: str):
    class Planted(Section):
        sound: float = Field(0.5, description="share of rows, in [0, 1]")
        planted_field: field = Field(None, description=description)

    (line,) = [line for line in complaints(Planted) if fault in line]
    assert "Planted.planted_field " in line
    assert not any(".sound " in line for line in complaints(Planted))
