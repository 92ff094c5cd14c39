"""The interface of all frozen encoders.

The modules of this package import torch, transformers and `tail` (whose classes need torch) inside the functions that
compute. A process that only names, hashes and checks encoders, such as the one that starts the workers, thus starts
quickly.
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
from distrec.data.manifest import ENCODED, TOKENS

# Weights come only from packages and local folders. transformers reads both variables when it is imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

Modality = Literal["text", "image"]
MODALITIES: tuple[Modality, ...] = ("text", "image")


def cut_name(modality: str, cut: int) -> str:
    """Name of a modality's token set: of the last layer's states, or of those before the last `cut` layers."""
    return f"{modality}{TOKENS}" + (f"-cut{cut}" if cut else "")


class Encoder(ABC):
    """Turns raw content into one vector per item, or into several: the tokens of the model's last layer.

    The constructor reads no weights, so an encoder can be named, hashed and sent to another process cheaply. The first
    `encode` loads them.

    Attributes:
        modality: What it reads: `text` (str) or `image` (the bytes of an image file).
        name: The name that the user gave, for messages.
        tokens: Number of vectors per item.
        width: Length of each vector.
        batch: Default number of items per forward pass, chosen for speed on a CPU.
        settings: All settings, besides the weights, that change the vectors.
        cut: Number of layers removed from the end of the model; its vectors are the hidden states before them.
        side: Feature maps are averaged down to `side` x `side` cells; None: they are not.
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
        """Hash of weights and settings: encoders with the same key give the same vectors."""
        return digest({"weights": self.weights_hash(), "width": self.width, **self.settings})[:16]

    @property
    def source(self) -> str:
        """The manifest's `source` of this encoder's feature sets. `distrec.encoders.stored` finds the encoder by it."""
        cut, pool = f" cut={self.cut}" if self.cut else "", f" pool={self.side}" if self.side else ""
        return f"{ENCODED}{self.name} {self.key}{cut}{pool}"

    @property
    def last_width(self) -> int:
        """Length of the last layer's vectors; equal to `width` unless layers were cut off."""
        return self.width

    def tail(self) -> Any:
        """The layers that were cut off, as a new `distrec.encoders.tail.Tail` on the CPU in evaluation mode.

        Raises:
            InputError: the model cannot be loaded.
        """
        raise NotImplementedError

    def defect(self, content: Any) -> str:
        """Why `content`, whose vectors are missing, cannot be encoded, as a phrase."""
        return "its vector exceeds the range of float16"

    @property
    def row_bytes(self) -> int:
        """Bytes of one item's vectors, stored as float16."""
        return 2 * self.tokens * self.width

    @abstractmethod
    def weights_hash(self) -> str:
        """SHA-256 over the files that define the model."""

    @abstractmethod
    def load(self) -> Any:
        """Load the model, which `encode` passes to `forward`."""

    @abstractmethod
    def forward(self, model: Any, batch: Sequence[Any]) -> np.ndarray:
        """Vectors `[len(batch), tokens * width]` float32 of one batch; a row is the concatenation of an item's tokens.

        NaN marks missing values: the whole row of content that cannot be decoded, and all places after the last real
        token of an item with fewer than `tokens`.
        """

    def encode(self, contents: Sequence[Any], batch: int | None = None) -> np.ndarray:
        """Vectors `[len(contents), tokens * width]` float32 in the order of `contents`, with NaN as in `forward`.

        Contents of similar size share a forward pass, which saves padding. `batch` is the number of items per pass.
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
    """SHA-256 over the names and bytes of files, in the given order."""
    whole = hashlib.sha256()
    for path in paths:
        whole.update(Path(path).name.encode())
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                whole.update(block)
    return whole.hexdigest()


def device() -> str:
    """The device on which encoders run: this process's GPU if it has one, otherwise the CPU."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
