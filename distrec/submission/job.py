"""A verb with its arguments as a job: its name, the files that it needs, the places that it reads and writes."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distrec.config.paths import PATH_WIDTH, REMOTE, located
from distrec.errors import InputError, shown
from distrec.submission.environment import refuse_secrets, texts_in
from distrec.submission.upload import Upload

# Options and arguments of each verb that name a folder or an s3:// prefix.
_PLACES: dict[str, tuple[str, ...]] = {
    "demo-data": ("out",),
    "synth": ("out",),
    "prepare": ("source", "out"),
    "check": ("data",),
    "encode": ("data", "cache"),
    "train": (),
    "tune": (),
    "evaluate": ("runs",),
    "report": ("sweep",),
    "drill": ("folder",),
    "doctor": ("storage",),
}
# Options and arguments that name a file of the working directory.
_FILES: dict[str, tuple[str, ...]] = {
    "prepare": ("config",),
    "train": ("config",),
    "tune": ("config",),
    "evaluate": ("beside",),
    "doctor": ("config",),
}


@dataclass
class Job:
    """What is submitted.

    Attributes:
        verb: the verb of `distrec`.
        arguments: its arguments, as they were given.
        name: what its submission ids begin with.
        files: (what it is, path) of the files that it needs from the working directory.
        places: (what it is, path) of the folders and `s3://` prefixes that it reads or writes.
    """

    verb: str
    arguments: list[str]
    name: str
    files: list[tuple[str, str]] = field(default_factory=list)
    places: list[tuple[str, str]] = field(default_factory=list)

    @classmethod
    def of(cls, parsed: argparse.Namespace, arguments: Sequence[str], environment: Mapping[str, str]) -> Job:
        """The job of a verb.

        Args:
            parsed: `arguments` as the verb's own parser reads them.
            arguments: the verb's arguments, without the verb.
            environment: that of this process, whose secrets must not be in any argument.

        Raises:
            InputError: the config of `train`, `tune` or `prepare` is invalid, or something holds a secret.
        """
        verb = parsed.verb
        refuse_secrets(arguments, "an argument", environment)
        job = cls(verb, list(arguments), verb)
        job.files.append(("entry point", job.script))
        job.files += list(_named(parsed, _FILES.get(verb, ())))
        job.places += list(_named(parsed, _PLACES[verb]))
        if verb == "encode":
            job.places += list(_encoders(parsed))
        elif verb == "prepare":
            _read_data_config(parsed)
        elif verb == "train":
            _read_run_config(job, parsed, environment)
        elif verb == "tune":
            _read_sweep_config(job, parsed, environment)
        return job

    @property
    def script(self) -> str:
        """The file that runs the verb, relative to the working directory."""
        return f"jobs/{self.verb.replace('-', '_')}.py"

    @property
    def entrypoint(self) -> str:
        """The job's command, for the shell with which Ray runs it."""
        return shlex.join(["python", self.script, *self.arguments])

    def check_files(self, upload: Upload) -> None:
        """Refuse a job that needs a file which it would not get.

        Raises:
            InputError: names the file, and the remedy.
        """
        if not (upload.folder / self.script).is_file():
            raise InputError(
                f"the working folder '{upload.folder}' has no '{self.script}', which the job runs; start this command "
                "in the root of the repository, or in a folder with copies of jobs/ and the configs."
            )
        for what, path in self.files:
            upload.require(path, what)

    def check_places(self) -> list[str]:
        """Refuse places that only the job's own folder would have.

        Returns:
            A line about each local place, which is right only if all hosts share it.

        Raises:
            InputError: a path is relative, or is neither local nor on `s3://`.
        """
        lines = []
        for what, path in self.places:
            located(path, what)
            if path.startswith(REMOTE):
                continue
            given = f"{what} is {shown(path, PATH_WIDTH)}"
            if not Path(path).expanduser().is_absolute():
                raise InputError(
                    f"{given}, a relative path, which for a job begins in a private copy of this folder that is "
                    "deleted after it; give an s3:// URL, or an absolute path that all hosts share."
                )
            lines.append(f"{given}, a local path: every host of the cluster must see the same there")
        return list(dict.fromkeys(lines))


def _read_run_config(job: Job, parsed: argparse.Namespace, environment: Mapping[str, str]) -> None:
    from distrec.config import load_run
    from distrec.methods.registry import resolve

    config = resolve(load_run(parsed.config, parsed.overrides))
    _take(job, config.model_dump(), config.run.name, environment)
    if config.run.graphs is not None:
        job.places.append(("key 'run.graphs'", config.run.graphs))


def _read_sweep_config(job: Job, parsed: argparse.Namespace, environment: Mapping[str, str]) -> None:
    from distrec.tuning.entries import SEARCH_FILE, resolve_entries
    from distrec.tuning.sweep import load_sweep

    sweep = load_sweep(parsed.config, parsed.overrides)
    resolve_entries(sweep)
    _take(job, sweep.model_dump(), sweep.run.name, environment)
    for label, entry in sweep.methods.items():
        job.files.append((f"config file of 'methods.{label}'", entry.config))
        if entry.spaces:
            search = Path(entry.config).with_name(SEARCH_FILE).as_posix()
            job.files.append((f"file of the spaces of 'methods.{label}'", search))
    if sweep.prepare is not None:
        job.files.append(("config file of 'prepare'", sweep.prepare.config))
        if sweep.prepare.source != "demo":
            job.places.append(("key 'prepare.source'", sweep.prepare.source))


def _read_data_config(parsed: argparse.Namespace) -> None:
    from distrec.config import apply_overrides, decode, load_file
    from distrec.data.prepare import DataConfig

    decode(DataConfig, apply_overrides(load_file(parsed.config), parsed.overrides))


def _take(job: Job, tree: dict[str, Any], name: str, environment: Mapping[str, str]) -> None:
    refuse_secrets(texts_in(tree), "the config", environment)
    job.name = name
    job.places += [("key 'data'", tree["data"]), ("key 'run.storage'", tree["run"]["storage"])]
    mlflow = tree["tracking"]["mlflow"]
    if mlflow is not None and "/" in mlflow and "://" not in mlflow:  # a folder, as MLflow reads it
        job.places.append(("key 'tracking.mlflow'", mlflow))


def _named(parsed: argparse.Namespace, names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The values of arguments and options, each with what it is."""
    for name in names:
        values = getattr(parsed, name)
        for value in values if isinstance(values, list) else [values]:
            if value is not None:
                yield _called(name), value


def _called(name: str) -> str:
    if name == "config":
        return "config file"
    if name == "folder":
        return "run"
    return f"option '--{name}'" if name in ("source", "out", "cache", "beside", "storage") else name.removesuffix("s")


def _encoders(parsed: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """The model folders that `encode` is given instead of names of encoders."""
    from distrec.encoders.registry import DEFAULTS

    for modality, default in DEFAULTS.items():
        value = getattr(parsed, modality)
        if value is not None and value not in (default, "none"):
            yield f"option '--{modality}'", value
