"""Room on a local disk: what a checkpoint needs is compared with what is free, and a full disk is one sentence.

Nothing is known about the room of an object store.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from distrec.data.storage import Folder
from distrec.errors import StorageFull

free_bytes = Folder.free_bytes


def require_room(folder: Folder, needed: int) -> None:
    """Check that `needed` more bytes fit on the disk of checkpoint `folder`.

    Raises:
        StorageFull: they do not.
    """
    if folder.local and (free := free_bytes(folder)) < needed:
        raise _full(folder, needed, free)


@contextmanager
def filling(folder: Folder, needed: int) -> Iterator[None]:
    """A context that writes to checkpoint `folder`, which takes `needed` bytes in all.

    Raises:
        StorageFull: the disk became full, or the quota on it was reached.
    """
    try:
        yield
    except StorageFull:
        if not folder.local:
            raise
        raise _full(folder, needed, free_bytes(folder)) from None


def _full(folder: Folder, needed: int, free: int) -> StorageFull:
    return StorageFull(
        f"checkpoint '{folder}' needs {needed:,} bytes, but its disk is full ({free:,} bytes free); delete what is not "
        "needed there, then run the same command again, which continues the run."
    )
