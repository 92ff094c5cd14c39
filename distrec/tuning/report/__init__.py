"""`distrec report SWEEP_DIR`: the results of a sweep as one HTML page, as Markdown and as JSON."""

from __future__ import annotations

from typing import Any

from distrec.data.storage import open_folder
from distrec.errors import InputError
from distrec.evaluation.report import aligned
from distrec.tuning.report import markdown, page, tables
from distrec.tuning.report.gather import gather
from distrec.tuning.report.pictures import read_items
from distrec.tuning.report.sections import sections


def report(path: str, examples: bool = True) -> dict[str, Any]:
    """Write `report.html`, `report.md` and `report.json` into a sweep folder and print the leaderboard.

    The sweep may be unfinished: what has not been measured is left out, and the report says so.

    Args:
        path: the sweep's folder, `<run.storage>/<run.name>`, local or `s3://`.
        examples: whether to show the histories and recommendations of some users, with the items' titles and pictures.
            Use False for a report that will be published on data whose licence forbids publishing them.

    Returns:
        The content of `report.json`; its schema is in `distrec/tuning/report/gather.py`.

    Raises:
        InputError: the folder holds no sweep, no trial has finished, or the folder cannot be written.
    """
    found = gather(path, examples)
    parts, missing = sections(found)
    items = read_items(found)
    folder = open_folder(path)
    try:
        folder.write_json(found, "report.json")
        folder.write_bytes(markdown.render(found, parts, missing, items).encode(errors="replace"), "report.md")
        folder.write_bytes(page.render(found, parts, missing, items).encode(errors="replace"), "report.html")
    except OSError as error:
        raise InputError(f"'{path}' cannot be written ({error}); give a sweep folder that you may write to.") from None
    for name in ("report.html", "report.md", "report.json"):
        print(f"{folder}/{name}")
    shown = tables.leaderboard(found)
    print("", *aligned([shown.head, *shown.rows]), sep="\n")
    return found
