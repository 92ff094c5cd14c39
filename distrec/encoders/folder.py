"""A local folder of a `transformers` model: read its config, hash it and load it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from distrec.encoders.base import Modality, device, hash_files
from distrec.errors import InputError

LAYERS: dict[Modality, dict[str, tuple[str, str | None]]] = {
    "text": dict.fromkeys(("bert", "roberta", "xlm-roberta"), ("encoder.layer", None)),
    "image": {
        "vit": ("layers", "layernorm"),
        "dinov2": ("encoder.layer", "layernorm"),
        "clip": ("vision_model.encoder.layers", None),
    },
}
"""By `model_type`, attribute paths of a model's layers and of the normalisation after them (None: it has none).

The layers of these models need only the hidden states before them and the mask of real tokens."""


class ModelFolder:
    """A folder with `config.json`, weights in `*.safetensors`, and the files of the tokenizer or image processor.

    Raises:
        InputError: `config.json` cannot be read.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config = self.read_json("config.json")

    def read_json(self, name: str) -> dict[str, Any]:
        """Read one of the folder's JSON files, which must hold an object.

        Raises:
            InputError: the file cannot be read or holds no object.
        """
        try:
            value = json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(
                f"encoder '{self.path}': {name} cannot be read ({error}); give the folder of a transformers model "
                "saved with save_pretrained."
            ) from None
        if not isinstance(value, dict):
            raise InputError(f"encoder '{self.path}': {name} does not hold an object; save the model again.")
        return value

    def width(self, tower: dict[str, Any], pooled: bool = True) -> int:
        """Length of the vectors of `tower`, a part of the config; with `pooled`, of a two-tower model's shared space.

        Raises:
            InputError: the config does not say.
        """
        shared = self.config.get("projection_dim") if pooled else None
        width = shared or tower.get("hidden_size") or (tower.get("hidden_sizes") or [None])[-1] or tower.get("dim")
        if not isinstance(width, int):
            raise InputError(
                f"encoder '{self.path}': config.json names no width (projection_dim, hidden_size, hidden_sizes or "
                "dim); give a text or vision encoder."
            )
        return width

    def hash(self) -> str:
        """SHA-256 over all files that can change the model's output."""
        return hash_files(
            sorted(path for path in self.path.iterdir() if path.suffix in (".json", ".safetensors", ".txt", ".model"))
        )

    def open(self, loader: Any, **options: Any) -> Any:
        """Call `loader.from_pretrained` on the folder, without network access and without running code from it.

        Raises:
            InputError: the folder cannot be loaded.
        """
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            return loader.from_pretrained(self.path, local_files_only=True, trust_remote_code=False, **options)
        except Exception as error:  # each file format raises its own errors
            reason = (
                f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no reason'}"
            )
            raise InputError(
                f"encoder '{self.path}' cannot be loaded ({reason}); give the folder of a complete transformers model "
                "with its weights in safetensors files."
            ) from None

    def outline(self) -> Any:
        """The model without weights, in evaluation mode; its outputs have shapes but no values."""
        import torch
        from transformers import AutoConfig, AutoModel

        config = self.open(AutoConfig)
        with torch.device("meta"):
            return AutoModel.from_config(config).eval()

    def model(self, modality: Modality = "text", cut: int = 0) -> Any:
        """The model without its last `cut` layers, in evaluation mode and fp32, on this process's device.

        `modality` says which tower of a two-tower model is cut.
        """
        return self._split(modality, cut)[0].to(device())

    def tail(self, modality: Modality, cut: int) -> Any:
        """The model's last `cut` layers, as `distrec.encoders.tail.Tail` in evaluation mode, fp32, on the CPU."""
        return self._split(modality, cut)[1]

    def check_cut(self, modality: Modality, cut: int) -> None:
        """Check that the last `cut` layers of the model can be cut off.

        Raises:
            InputError: its layers are of an unknown kind, or it has fewer.
        """
        from transformers import AutoConfig

        config = self.open(AutoConfig)
        if config.model_type not in LAYERS[modality] or getattr(config, "is_decoder", False):
            raise InputError(
                f"option '--cut' is {cut} but '{self.path}' is a {modality} model of type '{config.model_type}', whose "
                f"last layers cannot be cut off; give one of {', '.join(LAYERS[modality])}, or leave out --cut."
            )
        layers = getattr(config, "vision_config", config).num_hidden_layers
        if cut > layers:
            raise InputError(f"option '--cut' is {cut} but '{self.path}' has {layers} layers; give 1 to {layers}.")

    def _split(self, modality: Modality, cut: int) -> tuple[Any, Any]:
        """The model without its last `cut` layers, and these layers, None if `cut` is 0."""
        from transformers import AutoModel

        model = self.open(AutoModel, dtype="float32", use_safetensors=True).eval()  # others are pickles
        if not cut:
            return model, None
        from distrec.encoders.tail import split_transformer

        return model, split_transformer(model, *LAYERS[modality][model.config.model_type], cut)
