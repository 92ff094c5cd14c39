"""The one interface behind which every frozen encoder stands.

The modules of this package import torch and transformers inside the functions that compute, and so they do with `tail`,
whose classes need torch. A process that only names, hashes and checks encoders, as the one that starts the workers
does, then starts at once.
"""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from distrec.config import digest
from distrec.data.dataset import TOKENS

# Weights come from packages and local folders. transformers reads both when it is imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

Modality = Literal["text", "image"]
MODALITIES: tuple[Modality, ...] = ("text", "image")
ENCODED = "encoder "
"""How the source of a feature set that was encoded begins."""


def cut_name(modality: str, cut: int) -> str:
    """The name of a modality's token set: the last layer's, or what stands before the last `cut` layers."""
    return f"{modality}{TOKENS}" + (f"-cut{cut}" if cut else "")


class Encoder(ABC):
    """Raw content in, one vector per item out, or several: the tokens of the model's last layer.

    Making one reads no weights, so that it can be named, hashed and sent to another process; the first `encode` does.

    Attributes:
        modality: What it reads: `text` (str) or `image` (the bytes of an image file).
        name: How the user names it, for messages.
        tokens: Vectors per item.
        width: Length of a vector.
        batch: How many items it likes to take at once on a CPU.
        settings: Everything besides the weights that changes its vectors.
        cut: Layers that are left out at the end; its vectors are what stands before them.
        side: Cells a side to which a feature map is averaged down; None: it stays as it is.
    """

    modality: ClassVar[Modality]
    batch: ClassVar[int]
    name: str
    tokens: int = 1
    width: int
    settings: dict[str, Any]
    cut: int = 0
    side: int | None = None
    _model: Any = None

    @property
    def key(self) -> str:
        """Hash of the weights and settings: two encoders with one key give the same vectors."""
        return digest({"weights": self.weights_hash(), "width": self.width, **self.settings})[:16]

    @property
    def source(self) -> str:
        """What a manifest says of a feature set made by it, from which `distrec.encoders.stored` finds it again."""
        pool = f" pool={self.side}" if self.side else ""
        return f"{ENCODED}{self.name} {self.key}" + (f" cut={self.cut}{pool}" if self.cut else "")

    @property
    def last_width(self) -> int:
        """Length of the last layer's vectors, which `tail` makes; `width` unless it was cut."""
        return self.width

    def tail(self) -> Any:
        """The layers that were cut off, a new `distrec.encoders.tail.Tail` on the CPU in evaluation mode.

        Raises:
            InputError: it cannot be loaded.
        """
        raise NotImplementedError

    @property
    def row_bytes(self) -> int:
        """Bytes of one item's vectors in float16, as they are kept."""
        return 2 * self.tokens * self.width

    @abstractmethod
    def weights_hash(self) -> str:
        """SHA-256 over the files that define the model."""

    @abstractmethod
    def load(self) -> Any:
        """The model, ready to be used by `encode`."""

    @abstractmethod
    def forward(self, model: Any, batch: Sequence[Any]) -> np.ndarray:
        """Vectors `[len(batch), tokens * width]` float32 of one batch, an item's tokens one after another.

        NaN marks what is not there: a whole row where the content cannot be decoded, and what lies behind the last
        real token of content that is shorter than `tokens`.
        """

    def encode(self, contents: Sequence[Any], batch: int | None = None) -> np.ndarray:
        """Vectors `[len(contents), tokens * width]` float32 with NaN as in `forward`.

        Contents of like size go through the model together, which spares padding; the order of the rows is kept.
        """
        if self._model is None:
            self._model = self.load()
        size = batch or self.batch
        order = sorted(range(len(contents)), key=lambda at: len(contents[at]))
        vectors = np.empty((len(contents), self.tokens * self.width), np.float32)
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            vectors[chosen] = self.forward(self._model, [contents[at] for at in chosen])
        return vectors


def hash_files(paths: Sequence[str | Path]) -> str:
    """SHA-256 over names and bytes of files, in the order given."""
    whole = hashlib.sha256()
    for path in paths:
        whole.update(Path(path).name.encode())
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                whole.update(block)
    return whole.hexdigest()


def device() -> str:
    """Where encoders run: the GPU this process was given, otherwise the CPU."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
