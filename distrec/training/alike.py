"""Errors that every rank raises together, so that no rank waits in a collective for one that has failed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from distrec.errors import InputError
from distrec.parallel.world import World

_BYTES = 4096  # of an error's type and message; longer ones are cut


@contextmanager
def alike(world: World) -> Iterator[None]:
    """Raise on every rank what the first failing rank raised in the block. Collective, and a barrier.

    The block must not contain collectives. An `InputError` of any kind and an `OSError` keep their type on all ranks.

    Raises:
        RuntimeError: on the other ranks, for an error of another type.
    """
    mine: Exception | None = None
    try:
        yield
    except Exception as error:
        mine = error
    first = world.size - int(world.max_(torch.tensor(0 if mine is None else world.size - world.rank)))
    if first == world.size:
        return
    told = torch.zeros(1, _BYTES, dtype=torch.uint8)
    if mine is not None:
        text = f"{type(mine).__name__}\0{mine}".encode()[:_BYTES]
        told[0, : len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    told = world.rows_from(first, told, 0, 1)
    if mine is not None and world.rank == first:
        raise mine
    text = bytes(told[0].numpy()).rstrip(b"\0")
    name, _, message = text.decode(errors="ignore").partition("\0")
    raise _kinds(InputError).get(name, OSError if name == "OSError" else RuntimeError)(message) from mine


def _kinds(base: type[Exception]) -> dict[str, type[Exception]]:
    """`base` and all classes that inherit from it, by name."""
    out = {base.__name__: base}
    for kind in base.__subclasses__():
        out |= _kinds(kind)
    return out
