"""Find the encoder of a token set that `distrec encode --tokens --cut N` wrote, so that its last layers can train."""

from __future__ import annotations

from distrec.data.dataset import Dataset
from distrec.data.manifest import ENCODED_BY, FeatureEntry
from distrec.encoders.base import Encoder, Modality, cut_name
from distrec.encoders.registry import make_encoder
from distrec.errors import InputError


def cut_of(entry: FeatureEntry) -> int:
    """Number of layers that were cut off when the feature set was encoded; 0 if none were, or the set was imported."""
    found = ENCODED_BY.fullmatch(entry.source)
    return int(found["cut"] or 0) if found else 0


def stored_encoder(data: Dataset, key: str, name: str, modality: Modality, layers: int) -> Encoder:
    """The encoder that made token set `name` with its last `layers` layers cut off; its `tail()` is those layers.

    Reads the encoder's files, without network access.

    Args:
        data: the dataset with the set.
        key: the config key that names the set, for messages.
        name: the token set.
        modality: what the encoder reads.
        layers: number of layers to train.

    Raises:
        InputError: there is no such set, it was cut at another layer, or its encoder is missing or has changed.
    """
    entry, command = data.manifest.features.get(name), f"'distrec encode {data.folder} --tokens --cut {layers}'"
    if entry is None:
        raise InputError(
            f"key '{key}' is '{name}', which is not in the dataset, but 'method.train_encoder_layers' is {layers}; run "
            f"{command} and name '{cut_name(modality, layers)}'."
        )
    found = ENCODED_BY.fullmatch(entry.source)
    if found is None or cut_of(entry) != layers:
        state = f"was cut before the last {cut_of(entry)}" if cut_of(entry) else "holds no encoder's inner states"
        raise InputError(
            f"key '{key}' is '{name}', which {state}, but 'method.train_encoder_layers' is {layers}; run {command} and "
            f"name '{cut_name(modality, layers)}'."
        )
    pool = int(found["pool"]) if found["pool"] else None
    try:
        encoder = make_encoder(modality, found["encoder"], entry.tokens, pooled=False, image_pool=pool, cut=layers)
        same = encoder.key == found["key"]
    except (InputError, OSError) as error:
        raise InputError(
            f"key '{key}' is '{name}', whose encoder '{found['encoder']}' is not there any more ({error}); restore "
            f"it, or run {command} with another one."
        ) from None
    if not same:
        raise InputError(
            f"key '{key}' is '{name}', whose encoder '{found['encoder']}' has other weights or settings than when it "
            f"was encoded; run {command} again."
        )
    return encoder
