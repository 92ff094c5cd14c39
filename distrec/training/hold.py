"""The hold on the folder of a run or sweep: only one attempt at a time writes to it.

The attempt that holds a folder keeps a file `holder-NNNNNN.json` in it, which names its process, and writes it again
every `BEAT` seconds. A newcomer that finds such a file decides whether its attempt is alive:

* On the same machine it looks for the process, by number and start time.
* On another machine it watches the file. If that changes, its attempt is alive. If it has been the same for `WATCH`
  seconds, and for `LOOK` of them under the newcomer's eyes, its attempt is dead. The time before the newcomer came is
  known from the storage's own clock (`Folder.age`), so that no clocks of hosts are compared.

A newcomer takes a folder from a dead attempt by creating the file with the next number. Creating it fails if it exists,
so only one of several newcomers succeeds. The attempt whose file has the highest number holds the folder. One that was
suspended on a lost machine finds, when it goes on, that it does not, and writes no checkpoint any more.
"""

from __future__ import annotations

import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from distrec.data.storage import Folder
from distrec.errors import InputError, Interrupted, StorageError
from distrec.training.attempts import now, writing_to

# Seconds. WATCH is several beats, since a busy driver may delay one, and longer than workers train on after they have
# lost their driver (`distrec.training.heartbeat`). LOOK is about as long as a request to a storage that has just come
# back may wait (`distrec.data.s3`).
BEAT, WATCH, LOOK, STEP = 5.0, 30.0, 10.0, 1.0
_SETTLE = 1.0  # seconds after which a store that ignores "create only" shows which of two writers came last
_NAME = re.compile(r"holder-([0-9]{6,18})\.json")
_ACTIVE: set[str] = set()  # tokens of the holds of this process


class Hold:
    """Holds a folder until the block ends.

    Args:
        folder: the folder of a run or sweep; it is created if needed, and removed again if it then stays empty.
        what: "run" or "sweep", for messages.
        storage: the value of `run.storage`, for messages.

    Raises:
        InputError: another attempt holds the folder, and the message names its process; or it cannot be written.
    """

    def __init__(self, folder: Folder, what: str, storage: str):
        self._folder, self._what, self._storage, self._name, self._new = folder, what, storage, "", False
        self._record: dict[str, Any] = {
            "token": uuid.uuid4().hex, "host": socket.gethostname(), "machine": _machine(), "process": os.getpid(),
            "process_started": _process_started(os.getpid()), "job": _ray_job(), "since": now(), "beat": 0,
        }  # fmt: skip
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Hold:
        self._new = self._folder.local and not os.path.exists(self._folder.path)
        _ACTIVE.add(self._record["token"])
        try:
            with writing_to(self._storage):
                while not self._take():
                    pass
        except BaseException:
            _ACTIVE.discard(self._record["token"])
            raise
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._done.set()
        self._thread.join()
        _ACTIVE.discard(self._record["token"])
        with suppress(OSError, InputError):  # what is left is recognised as that of a dead process
            if self._mine():
                self._folder.remove(self._name)
        if self._new:
            with suppress(OSError):  # the folder is not empty
                os.rmdir(self._folder.path)

    def require(self) -> None:
        """Check that the folder is still held.

        Raises:
            InputError: another attempt has taken it, and the message names its process; or the holder's file was
                deleted.
            StorageError: the folder cannot be read now.
        """
        if self._held():
            return
        later = [name for name in holders(self._folder) if _number(name) > _number(self._name)]
        if later:
            raise InputError(
                f"{self._what} '{self._folder}' was taken over by {_who(_parsed(_content(self._folder, later[-1])))}, "
                f"because this attempt stood still for more than {WATCH:.0f} s; it has stopped and wrote nothing since."
            )
        raise InputError(
            f"'{self._folder.folder(self._name)}' was deleted or overwritten, so this attempt does not hold the "
            f"{self._what} any more and has stopped; run the same command again, which continues the {self._what}."
        )

    @contextmanager
    def holding(self) -> Iterator[None]:
        """A context that needs the hold to its end. A lost hold explains other errors, so it is raised in their place.

        Raises:
            InputError: as in `require`.
        """
        try:
            yield
        except Interrupted:
            raise
        except Exception:
            with suppress(StorageError):  # it would explain less than the error at hand
                self.require()
            raise
        self.require()

    def _take(self) -> bool:
        """Try to create the holder's file; False if the folder has changed meanwhile."""
        remedy = ", or use another 'run.name'"
        dead = {name: _left(self._folder, name, self._what, remedy) for name in holders(self._folder)}
        self._name = f"holder-{max(map(_number, dead), default=0) + 1:06d}.json"
        if not self._folder.create(json.dumps(self._record).encode(), self._name) and not self._mine():
            return False  # it is mine if the client sent its request again after a lost answer
        if not self._folder.local:
            time.sleep(_SETTLE)
        if not self._mine():
            return False
        there = {name: _content(self._folder, name) for name in holders(self._folder) if name != self._name}
        # Another newcomer may have created a file, with a new number or with that of an attempt that has just ended.
        if any(content is not None and content != dead.get(name) for name, content in there.items()):
            self._folder.remove(self._name)
            return False
        for name in there:
            with suppress(FileNotFoundError):  # its attempt has just ended and removed it
                self._folder.remove(name)
        return True

    def _beat(self) -> None:
        while not self._done.wait(BEAT):
            with suppress(Exception):  # of the storage; the next beat may work
                if not self._held():
                    return
                self._record["beat"] += 1
                self._folder.write_json(self._record, self._name)

    def _held(self) -> bool:
        return self._name in holders(self._folder)[-1:] and self._mine()

    def _mine(self) -> bool:
        return _parsed(_content(self._folder, self._name)).get("token") == self._record["token"]


def require_free(folder: Folder, what: str) -> None:
    """Check that no attempt is writing to `folder`.

    Raises:
        InputError: one is, and the message names its process; or the folder cannot be read.
    """
    for name in holders(folder):
        _left(folder, name, what)


def holders(folder: Folder) -> list[str]:
    """The names of the holders' files in a folder, lowest number first."""
    return sorted((name for name in folder.names() if _NAME.fullmatch(name)), key=_number)


def _number(name: str) -> int:
    return int(name[len("holder-") : -len(".json")])


def _left(folder: Folder, name: str, what: str, remedy: str = "") -> bytes | None:
    """The content of the file `name` of a dead attempt; None if the file has gone. May take `WATCH` seconds.

    Raises:
        InputError: the attempt is alive.
    """
    content = first = _content(folder, name)
    watch, quiet, looked = 0.0, 0.0, time.monotonic()
    while content is not None:
        record = _parsed(content)
        alive = _alive_here(record)
        if alive or (alive is None and content != first):
            raise InputError(_taken(folder, what, record, remedy))
        if alive is False or 0 < watch < quiet:
            break
        if not watch:
            watch = max(LOOK, WATCH - folder.age(name))
            print(
                f"{what} {folder} was left by {_who(record)}; looking for up to {watch:.0f} s whether that is alive",
                flush=True,
            )
        time.sleep(STEP)
        content = _content(folder, name)
        # While the storage does not answer, no attempt can write, so that time says nothing.
        looked, before = time.monotonic(), looked
        quiet += min(looked - before, 2 * STEP)
    return content


def _content(folder: Folder, name: str) -> bytes | None:
    try:
        return folder.read_bytes(name)
    except FileNotFoundError:
        return None
    except StorageError:
        raise
    except InputError:  # a folder in its place
        return b""


def _parsed(content: bytes | None) -> dict[str, Any]:
    """A holder's record; empty if it is damaged or just being written."""
    try:
        record = json.loads(content or b"")
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _alive_here(record: dict[str, Any]) -> bool | None:
    """Whether the holder's process runs on this machine; None if that cannot be known from here."""
    process = record.get("process")
    if record.get("machine") != _machine() or not isinstance(process, int) or process <= 0:
        return None
    if process == os.getpid() and record.get("process_started") == _process_started(process):
        return record.get("token") in _ACTIVE
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OverflowError:
        return None
    except PermissionError:  # another user's, of which /proc may show nothing
        if _process_started(process) is None:
            return None
    return _process_started(process) == record.get("process_started")


def _machine() -> str:
    """An id of what process numbers refer to: this boot of this machine, and this container."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def _process_started(process: int) -> int | None:
    """When a process started, in clock ticks since boot; None if it does not run or has ended as a zombie."""
    try:
        text = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return None
    state, *fields = text.rpartition(")")[2].split()  # the name before it may hold anything
    return None if state in "ZX" else int(fields[18])


def _ray_job() -> str | None:
    """The submission id of the Ray job that runs this process, if any."""
    config = _parsed(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "").encode())
    metadata = config.get("metadata")
    job = metadata.get("job_submission_id") if isinstance(metadata, dict) else None
    return job if isinstance(job, str) else None


def _who(record: dict[str, Any]) -> str:
    if not {"process", "host", "since"} <= record.keys():
        return "another process"
    job = f", Ray job {record['job']}" if record.get("job") else ""
    return f"process {record['process']} on host '{record['host']}' (since {record['since']}{job})"


def _taken(folder: Folder, what: str, record: dict[str, Any], remedy: str) -> str:
    stop = f"stop it with 'ray job stop {record['job']}'" if record.get("job") else "stop that process"
    doing = "trained" if what == "run" else "run"
    wait = "wait until it ends, " if remedy else "wait until it ends, or "
    return f"{what} '{folder}' is being {doing} by {_who(record)}; {wait}{stop}{remedy}."
