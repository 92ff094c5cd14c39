"""`manifest.json` of a prepared dataset, which `distrec.data.dataset` describes: its fields, reading and writing it."""

from __future__ import annotations

import re
import shlex
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, SerializerFunctionWrapHandler, model_serializer

from distrec.config import Section, decode
from distrec.config.bounds import MOST_MANIFEST, MOST_NUMBERS, MOST_ROWS
from distrec.config.text import read_json
from distrec.data.storage import Folder
from distrec.errors import InputError, first_few, shown

FORMAT = 1
Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = ("train", "valid", "test")
CONTEXT: Literal["context"] = "context"
"""Interactions of held-out users. A ranking may read them, training must not. Most datasets have none."""
TOKENS = "-tokens"
"""Suffix of the name of a token set: `text-tokens` is the token set of modality `text`."""
COLD = 5
"""An item with at most this many training interactions is cold."""
ENCODED = "encoder "
"""Prefix of the `source` of feature sets that `distrec encode` wrote."""
ENCODED_BY = re.compile(
    rf"{ENCODED}(?P<encoder>.+) (?P<key>[0-9a-f]{{16}})(?: cut=(?P<cut>\d{{1,4}}))?(?: pool=(?P<pool>\d{{1,4}}))?"
)
"""The whole `source` of such a set, as `Encoder.source` writes it."""
UNFINISHED = "prepare.unfinished"
"""Name of the file that marks a folder which a prepare has started to fill and may therefore clear."""

_AGAIN = "run 'distrec prepare' again"
_OPTION = {"cut": "--cut", "pool": "--image-pool"}
_SHOWN = 500  # characters of an error about a value in a manifest
_NAME = r"\w[\w.-]{0,59}"  # at most 240 bytes in UTF-8; file systems allow 255
_FILE = re.compile(
    rf"(?:users|items|(?:interactions/(?:{'|'.join((*SPLITS, CONTEXT))})|features/{_NAME}|content)/part-[\w-]{{1,60}})"
    r"\.parquet"
)


def _feature_name(name: str) -> str:
    if not re.fullmatch(_NAME, name):
        raise ValueError(
            "a feature set's name is also a folder's: use at most 60 letters, digits, '_', '-' and '.', and no '.' or "
            "'-' in front"
        )
    return name


def _file_name(name: str) -> str:
    if not _FILE.fullmatch(name):
        raise ValueError("is no file of a prepared dataset")
    return name


FeatureName = Annotated[str, AfterValidator(_feature_name)]
"""Config type: the name of a feature set, which is also the name of its folder."""
_FileName = Annotated[str, AfterValidator(_file_name)]


class FileEntry(Section):
    """One file of a prepared dataset."""

    rows: int = Field(ge=0, description="number of rows in the file")
    bytes: int = Field(ge=0, description="size of the file in bytes")
    sha256: str = Field(pattern="^[0-9a-f]{64}$", description="SHA-256 of the file's content, in hexadecimal")


class FeatureEntry(Section):
    """One feature set: a vector per item, or several (tokens)."""

    tokens: int = Field(1, ge=1, le=MOST_NUMBERS, description="number of vectors per item")
    width: int = Field(ge=1, le=MOST_NUMBERS, description="length of each vector")
    dtype: Literal["float16", "float32"] = Field(description="number format of the vectors, float16 or float32")
    missing: int = Field(ge=0, description="number of items without a vector")
    source: str = Field(description="encoder and its version, or the imported file")
    parts: list[str] = Field(description="files that hold the vectors, in index order")

    @model_serializer(mode="wrap")
    def _without_default(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out `tokens: 1`, so that datasets older than token sets keep their identity."""
        tree: dict[str, Any] = dump(self)
        if self.tokens == 1:
            tree.pop("tokens", None)
        return tree

    @property
    def encoded(self) -> bool:
        """Whether `distrec encode` wrote the set; otherwise it was imported."""
        return ENCODED_BY.fullmatch(self.source) is not None

    def remedy(self, name: str, data: object) -> str:
        """The command that writes the set, which is `name` in dataset `data`, again; for messages about a damaged one.

        It names the set's encoder, and leaves the other modality alone. How long texts may be is in no manifest.
        """
        found = ENCODED_BY.fullmatch(self.source)
        if found is None:
            return _AGAIN
        mine, other = ("image", "text") if name.startswith("image") else ("text", "image")
        options = ["distrec", "encode", str(data), f"--{mine}", found["encoder"], f"--{other}", "none"]
        if self.tokens > 1:
            options += ["--tokens", *(["--text-tokens", str(self.tokens)] if mine == "text" else [])]
            options += [part for key in ("cut", "pool") if found[key] for part in (_OPTION[key], found[key])]
        return f"run '{shlex.join(options)}' again"


class Manifest(Section):
    """`manifest.json`."""

    format: int = Field(description="version of the format of prepared datasets")
    name: str = Field(description="name of the dataset")
    users: int = Field(ge=1, le=MOST_ROWS, description="number of users")
    items: int = Field(ge=1, le=MOST_ROWS, description="number of items")
    interactions: dict[str, Annotated[int, Field(ge=0)]] = Field(description="number of interactions by split")
    split: str = Field(description="rule by which the interactions were split")
    id_order: str = Field(description="rule by which users and items were numbered")
    features: dict[FeatureName, FeatureEntry] = Field(description="feature sets by name")
    content: dict[str, Annotated[int, Field(ge=0)]] = Field(
        description="number of items that have a text or an image, by modality; empty without content"
    )
    config: dict[str, Any] = Field(description="data config that the dataset was prepared with")
    source: str = Field("", description="SHA-256 over the source files; empty if there are none")
    files: dict[_FileName, FileEntry] = Field(description="every file of the dataset by name")

    def parts(self, place: str) -> list[str]:
        """Names of the files in folder `place`, in index order; a feature set lists its own (`features`)."""
        return sorted(name for name in self.files if name.startswith(f"{place}/"))

    def remedy(self, file: str, data: object) -> str:
        """The command that writes `file` of dataset `data` again, for messages about a damaged file."""
        name = file.split("/")[1] if file.startswith("features/") else ""
        return self.features[name].remedy(name, data) if name in self.features else _AGAIN


def read_manifest(folder: Folder, path: str) -> Manifest:
    """The manifest of the dataset in `folder`; `path` is how the user wrote the folder.

    Raises:
        InputError: there is no dataset, its prepare did not finish, or the file is not a manifest of this format.
    """
    restore = "restore it, or delete the folder and run 'distrec prepare' again"
    try:
        size = folder.size("manifest.json")
        if size > MOST_MANIFEST:
            raise InputError(
                f"data '{path}': manifest.json has {size:,} bytes, more than the {MOST_MANIFEST:,} that are read; "
                f"{restore}."
            )
        tree = read_json(folder.read_bytes("manifest.json"), f"data '{path}': manifest.json", restore)
    except FileNotFoundError:
        raise InputError(f"data '{path}' has no manifest.json ({_there(folder, path)}.") from None
    if not isinstance(tree, dict) or tree.get("format") != FORMAT:
        found = shown(tree.get("format") if isinstance(tree, dict) else type(tree).__name__)
        raise InputError(
            f"data '{path}': manifest format is {found} but this version reads {FORMAT}; delete the folder and "
            "run 'distrec prepare' again."
        )
    try:
        return decode(Manifest, tree, "manifest")
    except InputError as error:
        raise InputError(f"data '{path}': {shown(error, _SHOWN, quoted=False).rstrip('.')}; {restore}.") from None


def write_manifest(folder: Folder, manifest: Manifest) -> None:
    """Write `manifest.json`, atomically; always the last file of a prepare or encode."""
    folder.write_json(manifest.model_dump(), "manifest.json")


def _there(folder: Folder, path: str) -> str:
    """What a folder without a manifest holds, and what to do; the end of a sentence with an open bracket."""
    if folder.is_file():
        return "it is a file); give a folder that 'distrec prepare' has written"
    names = folder.names()
    if not names or UNFINISHED in names:
        state = "an interrupted prepare" if names else "nothing"
        return f"{state} is there); run 'distrec prepare CONFIG --source DIR --out {path}'"
    listed = first_few(map(shown, names), len(names))
    return f"{listed} {'is' if len(names) == 1 else 'are'} there); give a folder that 'distrec prepare' has written"
