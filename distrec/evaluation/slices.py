"""Slices show where a ranking is good or bad: cold items, items without a modality, users by activity.

A slice of items keeps the held-out pairs whose item is in the slice, and the users that have such a pair. Its metrics
show how well those items are found; they are still ranked among all items. A slice of users keeps all held-out pairs of
these users.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from distrec.data.dataset import Dataset, Interactions
from distrec.data.manifest import COLD, TOKENS
from distrec.evaluation.ranking import Ranked

ACTIVITY = (0, 5, 10, 20, 50)  # the most training interactions in each group of users; one more group has no limit


@dataclass(frozen=True)
class Slice:
    """A part of the held-out pairs, with their ranks in the whole ranking."""

    name: str
    meaning: str
    ranked: Ranked


def missing_items(dataset: Dataset) -> dict[str, np.ndarray]:
    """For each feature set that lacks some items, which items it lacks: bool `[items]`.

    A modality's token set has the same content as its plain set. So it is listed under the modality's name, and only if
    the plain set is not listed.
    """
    out: dict[str, np.ndarray] = {}
    for name, feature in sorted(dataset.manifest.features.items(), key=lambda entry: entry[1].tokens > 1):
        modality = name.partition(TOKENS)[0] if feature.tokens > 1 else name  # also of `text-tokens-cut2`
        if feature.missing and modality not in out:
            out[modality] = dataset.missing(name)
    return out


def slices(
    ranked: Ranked, train: Interactions, users: int, items: int, missing: Mapping[str, np.ndarray]
) -> list[Slice]:
    """All slices, including those without users.

    Args:
        ranked: the ranking of the whole split.
        train: the training interactions, which decide which items are cold and how active users are.
        users: the number of users.
        items: the number of items.
        missing: the items that lack each feature set, as `missing_items` returns them.
    """
    out = []
    seen = np.bincount(train.item, minlength=items)[ranked.item]
    for name, meaning, chosen in (
        ("items.cold", f"items with at most {COLD} training interactions", seen <= COLD),
        ("items.unseen", "items without training interactions (part of items.cold)", seen == 0),
        ("items.warm", f"items with more than {COLD} training interactions", seen > COLD),
    ):
        out.append(Slice(name, meaning, ranked.keep(chosen)))
    for feature, lacking in missing.items():
        out.append(Slice(f"items.without.{feature}", f"items without {feature}", ranked.keep(lacking[ranked.item])))
    if len(missing) > 1:
        lacking = np.logical_or.reduce(list(missing.values()))
        out.append(Slice("items.without.any", "items without at least one feature", ranked.keep(lacking[ranked.item])))

    active = np.bincount(train.user, minlength=users)[ranked.user_of_pair()]
    group = np.searchsorted(ACTIVITY, active)
    lows = [0, *(end + 1 for end in ACTIVITY)]
    for number, low in enumerate(lows):
        ends = f"{low}-{ACTIVITY[number]}" if number < len(ACTIVITY) else f"{low}+"
        span = "0" if number == 0 else ends
        out.append(Slice(f"users.{span}", f"users with {span} training interactions", ranked.keep(group == number)))
    return out
