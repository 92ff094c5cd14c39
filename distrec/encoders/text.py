"""Text encoders: any `transformers` model, with its token vectors averaged and scaled to unit length, or all kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from distrec.encoders.base import Encoder, device
from distrec.encoders.folder import ModelFolder


class TransformerText(Encoder):
    """A `transformers` text model: the mean of its last layer's token vectors, scaled to unit length.

    A two-tower model (CLIP) gives its own text vector instead of the mean. With `pooled` false, the tokens are the last
    layer's vectors of the first `max_tokens` word pieces, including special ones, neither averaged nor scaled.

    Args:
        name: The name that the user gave.
        path: A folder with the model and its tokenizer.
        max_tokens: Maximum tokens of a text, at most the model's number of positions; longer texts are truncated.
        pooled: Whether to return one vector per text.
        cut: With `pooled` false, remove this many layers from the end.

    Raises:
        InputError: a file of the folder cannot be read, or its last layers cannot be cut off.
    """

    modality = "text"
    batch = 8

    def __init__(self, name: str, path: str, max_tokens: int, pooled: bool = True, cut: int = 0):
        self.name, self.folder = name, ModelFolder(path)
        config = self.folder.config
        tower = config.get("text_config") or config
        self.width = self.folder.width(tower, pooled)
        self.max_tokens = min(max_tokens, int(tower.get("max_position_embeddings", max_tokens)))
        self.settings = {"pooling": "mean", "length": 1} if pooled else {"pooling": "none"}
        self.settings["max_tokens"] = self.max_tokens
        if cut:
            self.folder.check_cut(self.modality, cut)
            self.cut, self.settings["cut"] = cut, cut
        self.pooled, self.tokens = pooled, 1 if pooled else self.max_tokens

    def weights_hash(self) -> str:
        return self.folder.hash()

    def load(self) -> Any:
        from transformers import AutoTokenizer

        return self.folder.open(AutoTokenizer), self.folder.model(self.modality, self.cut)

    def tail(self) -> Any:
        return self.folder.tail(self.modality, self.cut)

    def forward(self, model: Any, batch: Sequence[str]) -> np.ndarray:
        import torch

        tokenizer, network = model
        length = min(self.max_tokens, tokenizer.model_max_length)
        tokens = tokenizer(list(batch), padding=True, truncation=True, max_length=length, return_tensors="pt")
        tokens = tokens.to(device())
        with torch.inference_mode():
            two_tower = hasattr(network, "get_text_features")
            output = network.get_text_features(**tokens) if two_tower else network(**tokens)
        if not self.pooled:
            return self._spread(output.last_hidden_state.cpu().numpy(), tokens["attention_mask"].cpu().numpy() > 0)
        if two_tower:
            vectors = output.pooler_output
        else:
            mask = tokens["attention_mask"].unsqueeze(-1).float()
            vectors = (output.last_hidden_state * mask).sum(1) / mask.sum(1)
        result: np.ndarray = torch.nn.functional.normalize(vectors, dim=1).cpu().numpy()
        return result

    def _spread(self, states: np.ndarray, real: np.ndarray) -> np.ndarray:
        """Move the real states of `[n, length, width]` to the start of each row, on whichever side the padding is.

        Returns:
            `[n, tokens * width]` float32, NaN after the real tokens.
        """
        rows = np.full((len(states), self.tokens, self.width), np.nan, np.float32)
        for row, state, kept in zip(rows, states, real):
            row[: kept.sum()] = state[kept]
        return rows.reshape(len(rows), -1)
