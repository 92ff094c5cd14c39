"""Rules that number users and items.

* `sorted`: ascending original ids (strings by their UTF-8 bytes).
* `first_seen`: in the order in which the kept interactions first name them; items without one follow in catalogue
  order.
* `given`: the original ids are the indices, so they must be 0 to n - 1 with none left out.
* `shuffled`: a permutation drawn from the seed, so that all blocks of rows have similar popularity.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import pyarrow as pa

from distrec.data import keyed
from distrec.errors import InputError

IdOrder = Literal["sorted", "first_seen", "given", "shuffled"]
_LARGEST = 2**31 - 1


def number(
    rule: IdOrder, what: str, ids: pa.Array, kept: np.ndarray, rows: np.ndarray, later: np.ndarray, seed: int
) -> np.ndarray:
    """Put the kept codes in index order.

    Args:
        rule: The id order.
        what: `user` or `item`, for errors and the draw.
        ids: `[codes]` original ids, ascending.
        kept: Codes that get an index, ascending.
        rows: `[interactions]` codes in source order, for `first_seen`.
        later: `[codes]` sort key of codes without an interaction, for `first_seen`.
        seed: Seed of `shuffled`.

    Returns:
        The elements of `kept`; the one at position i gets index i.

    Raises:
        InputError: the rule is `given` and the ids are not 0 to n - 1.
    """
    if rule == "given":
        _check_given(what, ids.take(pa.array(kept)))
    if rule == "first_seen":
        first = np.full(len(ids), len(rows))
        first[rows[::-1]] = np.arange(len(rows))[::-1]
        return kept[np.lexsort((later[kept], first[kept]))]
    if rule == "shuffled":
        return kept[keyed.permutation(("ids", what, seed), len(kept))]
    return kept


def _check_given(what: str, ids: pa.Array) -> None:
    if not pa.types.is_int64(ids.type):
        raise InputError(f"key 'id_order' is 'given' but {what} ids are strings such as '{ids[0]}'; choose 'sorted'.")
    values = ids.to_numpy()
    if values[-1] >= _LARGEST:
        raise InputError(
            f"key 'id_order' is 'given' but {what} id {values[-1]} overflows a 32-bit index; choose 'sorted'."
        )
    if values[-1] != len(values) - 1:
        absent = int(np.flatnonzero(values != np.arange(len(values)))[0])
        raise InputError(
            f"key 'id_order' is 'given' but {what} id {absent} is absent among the {len(values)} kept ids (largest "
            f"{values[-1]}); choose 'sorted'."
        )
