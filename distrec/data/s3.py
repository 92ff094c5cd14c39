"""The client of object stores: s3fs, with patience.

The retries of botocore and s3fs are counted, not timed. botocore's "standard" and "adaptive" also share a quota among
all requests of a process, which the requests of one outage use up; its "legacy" draws waits whose sum varies between 30
and 250 seconds; and s3fs repeats what botocore has given up, at up to two levels. So both are told not to repeat a
request, and a handler of botocore's event `needs-retry` does: for `PATIENCE` seconds after its first failure. s3fs
still repeats a read whose answer breaks off, beginning with a new request.
"""

from __future__ import annotations

import asyncio
import random
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import unquote, urlsplit

from aiobotocore.httpsession import AIOHTTPSession
from botocore.exceptions import BotoCoreError, ReadTimeoutError
from s3fs import S3FileSystem

from distrec.data.refusals import Unanswered, mendable

PATIENCE = 120.0  # seconds for which a request is sent again
SILENCE = 10.0  # seconds after which one line says so
BLOCK = 32 << 20  # bytes of a part of an upload; there may be 10,000 parts
SLOWEST = 512 << 10  # bytes per second of an upload that we wait for
_FIRST_WAIT, _LONGEST_WAIT = 0.2, 10.0  # seconds
_JITTER = random.Random()  # of its own, so that no seeded sequence moves
_BEGAN = "distrec_first_failure"  # a key of botocore's context, which the attempts of one request share


class _Session(AIOHTTPSession):
    """Limits the time of uploads. aiohttp does not: it waits without end for "100 Continue" and to fill the socket."""

    async def send(self, request: Any) -> Any:
        if "Expect" not in request.headers:  # an upload's content; a reading has its limit between bytes
            return await super().send(request)
        size = int(request.headers.get("Content-Length") or request.headers.get("X-Amz-Decoded-Content-Length") or 0)
        limit = S3.read_timeout + size / SLOWEST
        try:
            return await asyncio.wait_for(super().send(request), limit)
        except TimeoutError:
            raise ReadTimeoutError(endpoint_url=request.url, error=f"no answer within {limit:.0f} s") from None


class S3(S3FileSystem):
    """s3fs with one attempt per request by itself, and `wait` in place of its other attempts.

    Credentials, region and endpoint come from where botocore looks: `AWS_…` variables, the profile that `AWS_PROFILE`
    names, a web identity, the container's or the machine's role. It renews what has an expiry date; keys that stand in
    a file are read once per process.
    """

    connect_timeout = 10
    read_timeout = 30  # without a byte
    retries = 10  # of a read whose answer broke off

    def __init__(self, **options: Any):
        # One transfer at a time: a file in reading or writing takes the memory of one block, and a small file is read
        # by one request in place of two.
        config = {"retries": {"mode": "standard", "total_max_attempts": 1}, "http_session_cls": _Session}
        super().__init__(config_kwargs=config, max_concurrency=1, **options)

    async def set_session(self, *arguments: Any, **options: Any) -> Any:
        """As in s3fs; every client gets the handler."""
        client = await super().set_session(*arguments, **options)
        client.meta.events.register("needs-retry.s3", wait, unique_id="distrec-patience")
        return client

    @contextmanager
    def uploading(self, path: str) -> Iterator[Any]:
        """A context that writes a file in parts; it appears when the context ends, and not at all after an error."""
        mark = uuid.uuid4().hex
        file = self.open(path, "wb", block_size=BLOCK, Metadata={"writer": mark})
        try:
            yield file
            try:
                file.close()
            except FileNotFoundError:
                # The store knows no such upload. It has completed it if its answer was lost and we asked again.
                self.invalidate_cache()
                if self.metadata(path).get("writer") != mark:
                    raise
        except BaseException as error:
            file.closed = True  # or the end of the object would complete the upload of a part of the content
            if not isinstance(error, Unanswered):  # if it is, `abort_uploads` removes the parts later
                with suppress(OSError, BotoCoreError):
                    file.discard()
            raise

    def age(self, path: str) -> float | None:
        """Seconds since an object was written, at least, by the store's clock; None if it does not tell."""
        bucket, _, key = path.partition("/")
        answer = self.call_s3("head_object", Bucket=bucket, Key=key)
        now = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
        if now is None or "LastModified" not in answer:
            return None
        # Both are whole seconds, so their difference may be too large by less than one.
        return (parsedate_to_datetime(now) - answer["LastModified"]).total_seconds() - 1.0

    def abort_uploads(self, path: str) -> int:
        """Abort all uploads in parts of files below a folder, and return their number; see `Folder.abort_uploads`."""
        bucket, _, key = path.partition("/")
        aborted, mark = 0, {"Prefix": f"{key}/" if key else ""}
        with suppress(OSError, BotoCoreError):
            while True:
                found = self.call_s3("list_multipart_uploads", Bucket=bucket, **mark)
                for upload in found.get("Uploads", []):
                    with suppress(FileNotFoundError):  # it has just been completed or aborted
                        self.abort_mpu(bucket, upload["Key"], upload["UploadId"])
                        aborted += 1
                if not found.get("IsTruncated"):
                    break
                mark |= {"KeyMarker": found["NextKeyMarker"], "UploadIdMarker": found["NextUploadIdMarker"]}
        return aborted


def wait(
    response: Any, caught_exception: Exception | None, attempts: int, request_dict: dict[str, Any], **_: Any
) -> float | None:
    """Seconds to wait before a request is sent again; None if it succeeded, or failed for good.

    Raises:
        Unanswered: it has failed for `PATIENCE` seconds.
    """
    what = mendable(response, caught_exception)
    if what is None:
        return None
    began = request_dict["context"].setdefault(_BEGAN, time.monotonic())
    passed = time.monotonic() - began
    pause = min(_FIRST_WAIT * 2.0 ** min(attempts - 1, 16), _LONGEST_WAIT) * _JITTER.uniform(0.5, 1.0)
    if passed >= PATIENCE:
        raise Unanswered(f"{what}, for {PATIENCE:g} s")
    if passed + pause > SILENCE:
        _OUTAGE.say(request_dict["url"], what)
    return min(pause, PATIENCE - passed)  # the last attempt is at the end of the patience


class _Outage:
    """Says once per outage, and not once per request, that a store does not answer."""

    def __init__(self) -> None:
        self._lock, self._last = threading.Lock(), float("-inf")

    def say(self, url: str, what: str) -> None:
        with self._lock:
            now = time.monotonic()
            if now - self._last < PATIENCE:
                return
            self._last = now
        place = urlsplit(url)
        print(
            f"storage {place.scheme}://{place.netloc}{unquote(place.path)} does not answer ({what}); trying again for "
            f"up to {PATIENCE:g} s",
            file=sys.stderr, flush=True,
        )  # fmt: skip


_OUTAGE = _Outage()
