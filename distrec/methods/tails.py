"""Content end to end: the last layers of the text and image encoders train with the method that reads their tokens.

The hidden states before these layers are stored as a token set. The layers themselves are part of the dense module.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from distrec.data.dataset import Dataset
from distrec.encoders.base import MODALITIES, Encoder, Modality
from distrec.encoders.stored import cut_of, stored_encoder
from distrec.encoders.tail import Tail
from distrec.errors import InputError
from distrec.methods.base import require_tokens
from distrec.tables.features import TokenBlock

_ITEMS_AT_ONCE = 256


class EndToEnd(nn.Module):
    """The encoders' last layers, followed by a module that reads their tokens.

    Args:
        reader: the module that follows, called with items `(ids, text, image, real)`, such as `imt.Branches`.
        tails: the last layers by modality.
    """

    def __init__(self, reader: nn.Module, tails: Mapping[Modality, Tail]):
        super().__init__()
        self.reader, self.tails = reader, nn.ModuleDict({str(name): tail for name, tail in tails.items()})

    def forward(self, items: tuple[torch.Tensor, ...] | None = None, **named: Any) -> Any:
        """As `reader`, but with the hidden states before the last layers as `text` and `image`.

        Where an item lacks a modality, `real` is False for all of its tokens.
        """
        if items is not None:
            ids, text, image, real = items
            text_real, image_real = real.tensor_split([text.shape[1]], 1)
            text, text_real = self.tails["text"](text, text_real)
            image, image_real = self.tails["image"](image, image_real)
            items = ids, text, image, torch.cat([text_real, image_real], 1)
        return self.reader(items, **named)


def encoders_to_train(data: Dataset, sets: Mapping[Modality, str], layers: int) -> dict[Modality, Encoder]:
    """The encoders whose last `layers` layers train, by modality; none if `layers` is 0.

    Args:
        sets: the token sets that `method.text_tokens` and `method.image_tokens` name, by modality.

    Raises:
        InputError: a set is absent or was not cut before exactly these layers, or its encoder is gone or has changed.
    """
    keys = {modality: f"method.{modality}_tokens" for modality in MODALITIES}
    if layers:
        return {name: stored_encoder(data, keys[name], sets[name], name, layers) for name in MODALITIES}
    require_tokens(data, {keys[name]: sets[name] for name in MODALITIES}, "odmt")
    for modality, name in sets.items():
        if cut := cut_of(data.feature(name)):
            raise InputError(
                f"key '{keys[modality]}' is '{name}', which was cut before the last {cut}, but "
                f"'method.train_encoder_layers' is 0; set it to {cut}, or name a set of last hidden states, such as "
                f"'{modality}-tokens'."
            )
    return {}


@torch.no_grad()
def first_tokens(tail: Tail, block: TokenBlock) -> torch.Tensor:
    """My items' first tokens after the last layer, with the encoder's weights as loaded `[my items, width]`."""
    pairs = zip(block.values.split(_ITEMS_AT_ONCE), block.mask.split(_ITEMS_AT_ONCE), strict=True)
    return torch.cat([tail(values.float(), mask)[0][:, 0] for values, mask in pairs])
