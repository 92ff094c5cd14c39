"""A proxy between clients and an S3 server that answers wrongly, late or not at all when it is told to.

It forwards everything, with the header `Host` unchanged, because that is part of the signature. Faults are set over
HTTP on a second port, so that any process can: `python -m tests.faulty_s3 --listen HOST:PORT --upstream HOST:PORT
--control HOST:PORT`, then

    curl -d '{"answer": 503, "code": "SlowDown", "seconds": 60}' HOST:PORT/fault   # one more fault
    curl -d '' HOST:PORT/heal                                                      # no faults, counts at 0
    curl HOST:PORT/counts                                                          # requests by kind, fault and key

`FaultyS3` does the same from Python.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import socket
import struct
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web
from yarl import URL

_ERROR = '<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>as ordered</Message></Error>'
_HOPS = {"connection", "keep-alive", "transfer-encoding", "upgrade", "te", "trailer", "proxy-authorization", "expect"}
_KINDS = {  # of requests, by method, whether the path names an object, and the key of the query that decides
    ("GET", True, ""): "GetObject", ("HEAD", True, ""): "HeadObject", ("PUT", True, ""): "PutObject",
    ("DELETE", True, ""): "DeleteObject", ("POST", True, "uploads"): "CreateMultipartUpload",
    ("PUT", True, "uploadId"): "UploadPart", ("POST", True, "uploadId"): "CompleteMultipartUpload",
    ("DELETE", True, "uploadId"): "AbortMultipartUpload", ("GET", False, ""): "ListObjects",
    ("GET", False, "uploads"): "ListMultipartUploads", ("POST", False, "delete"): "DeleteObjects",
}  # fmt: skip


@dataclass
class Fault:
    """One fault: exactly one action, and which requests it meets. Further faults are tried in the order they were set.

    Attributes:
        answer: this HTTP status with S3 error `code`, without asking the server.
        code: the error code, such as SlowDown; a HEAD request gets the status alone, as from every store.
        stall: hold the request for so many seconds, and then forward it.
        reset: end the connection by a reset (RST), without asking the server.
        lose: let the server do what is asked, and reset the connection in place of its answer.
        cut: give this share of the answer's body, and then reset the connection.
        rate: forward the bodies of request and answer at so many bytes per second.
        kinds: only requests of these kinds, such as GetObject; all if empty.
        first: only the first so many requests that it could meet.
        fraction: only this share of them, drawn by chance.
        seconds: only from now until then; a stall ends then too.
    """

    answer: int = 0
    code: str = ""
    stall: float = 0
    reset: bool = False
    lose: bool = False
    cut: float | None = None
    rate: float = 0
    kinds: tuple[str, ...] = ()
    first: int | None = None
    fraction: float = 1.0
    seconds: float | None = None

    def __post_init__(self) -> None:
        self.end = None if self.seconds is None else time.monotonic() + self.seconds
        if len([value for value in self._actions().values() if value not in (0, None)]) != 1:
            raise ValueError(f"a fault needs one action of {', '.join(self._actions())}")

    def _actions(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("answer", "stall", "reset", "lose", "cut", "rate")}

    @property
    def action(self) -> str:
        """The name of its action."""
        return next(name for name, value in self._actions().items() if value not in (0, None))

    def meets(self, kind: str) -> bool:
        """Whether it meets a request that has just come."""
        if (self.end is not None and time.monotonic() > self.end) or (self.kinds and kind not in self.kinds):
            return False
        if self.first == 0 or random.random() >= self.fraction:
            return False
        if self.first is not None:
            self.first -= 1
        return True


class Proxy:
    """The proxy's state and its handlers."""

    def __init__(self, upstream: str):
        self.upstream = upstream
        self.faults: list[Fault] = []
        self.counts: Counter[str] = Counter()

    async def serve(self, listen: str, control: str) -> None:
        """Answer on both addresses, each `host:port`, until the process ends."""
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10)
        async with aiohttp.ClientSession(timeout=timeout, auto_decompress=False) as self.session:
            for handler, address in ((self._forward, listen), (self._control, control)):
                runner = web.ServerRunner(web.Server(handler, client_max_size=1 << 40))
                await runner.setup()
                host, _, port = address.rpartition(":")
                await web.TCPSite(runner, host, int(port)).start()
            await asyncio.Event().wait()

    async def _control(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.path == "/fault":
            value = json.loads(await request.text())
            if unknown := value.keys() - {field.name for field in fields(Fault)}:
                return web.Response(status=400, text=f"unknown: {', '.join(unknown)}")
            self.faults.append(Fault(**{**value, "kinds": tuple(value.get("kinds", ()))}))
        elif request.path == "/heal":
            self.faults, self.counts = [], Counter()
        elif request.path != "/counts":
            return web.Response(status=404, text="fault, heal or counts")
        return web.json_response(self.counts)

    async def _forward(self, request: web.BaseRequest) -> web.StreamResponse:
        kind = _kind(request)
        self.counts[kind] += 1
        if signed := re.search(r"Credential=([^/]+)/", request.headers.get("Authorization", "")):
            self.counts[f"key {signed[1]}"] += 1
        fault = next((fault for fault in self.faults if fault.meets(kind)), None)
        if fault is not None:
            self.counts[f"fault {fault.action}"] += 1
        if fault is not None and fault.stall:
            left = fault.stall if fault.end is None else min(fault.stall, fault.end - time.monotonic())
            await asyncio.sleep(max(0.0, left))
        if "100-continue" in request.headers.get("Expect", "") and request.transport is not None:
            request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")  # the client sends the body only after this
        body = await _body(request, fault.rate if fault else 0)
        if fault is not None and fault.answer:
            text = _ERROR.format(code=fault.code or "InternalError")
            return web.Response(status=fault.answer, text=text, content_type="application/xml")
        if fault is not None and fault.reset:
            return _reset(request)
        headers = {name: value for name, value in request.headers.items() if name.lower() not in _HOPS}
        url = URL(f"http://{self.upstream}{request.raw_path}", encoded=True)
        async with self.session.request(request.method, url, headers=headers, data=body) as answer:
            content = await answer.read()
            if fault is not None and fault.lose:
                return _reset(request)
            kept = {name: value for name, value in answer.headers.items() if name.lower() not in _HOPS}
            response = web.StreamResponse(status=answer.status, headers=kept)
        if request.method != "HEAD":
            response.content_length = len(content)
        await response.prepare(request)
        if fault is not None and fault.cut is not None:
            await response.write(content[: int(len(content) * fault.cut)])
            await asyncio.sleep(0.05)  # let the part arrive before the reset
            return _reset(request, response)
        for piece in _pieces(content, fault.rate) if fault is not None and fault.rate else [content]:
            if request.method != "HEAD":
                await response.write(piece)
            if fault is not None and fault.rate:
                await asyncio.sleep(len(piece) / fault.rate)
        await response.write_eof()
        return response


def _kind(request: web.BaseRequest) -> str:
    inside = request.path.strip("/").partition("/")[2] != ""
    if "x-amz-copy-source" in request.headers:
        return "CopyObject"
    key = next((key for key in ("uploadId", "uploads", "delete") if key in request.query), "")
    return _KINDS.get((request.method, inside, key), f"{request.method} {'object' if inside else 'bucket'}")


async def _body(request: web.BaseRequest, rate: float) -> bytes:
    body = bytearray()
    while block := await request.content.read(max(1, int(rate / 10)) if rate else 1 << 20):
        body += block
        if rate:
            await asyncio.sleep(len(block) / rate)
    return bytes(body)


def _pieces(content: bytes, rate: float) -> Iterator[bytes]:
    step = max(1, int(rate / 10))
    for start in range(0, len(content), step):
        yield content[start : start + step]


def _reset(request: web.BaseRequest, response: web.StreamResponse | None = None) -> web.StreamResponse:
    """End the connection by a reset, and return something for aiohttp, which cannot send it any more."""
    if request.transport is not None:
        connection = request.transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        request.transport.abort()
    return response or web.Response()


class FaultyS3:
    """Control of a running proxy.

    Args:
        control: `host:port` of its control.
        url: the URL that clients take as their endpoint.
        bucket: an `s3://` URL of a bucket behind it, for tests.
    """

    def __init__(self, control: str, url: str, bucket: str = ""):
        self.control, self.url, self.bucket = control, url, bucket

    def fault(self, **settings: Any) -> None:
        """Set one more fault, of the fields of `Fault`."""
        self._call("fault", settings)

    def heal(self) -> None:
        """Take away all faults, and count from 0 again."""
        self._call("heal", {})

    def counts(self) -> Counter[str]:
        """Requests since the last `heal`: by kind, met by faults as "fault <action>", signed as "key <access key>"."""
        return Counter(self._call("counts"))

    def _call(self, path: str, value: Any = None) -> Any:
        data = None if value is None else json.dumps(value).encode()
        with urllib.request.urlopen(f"http://{self.control}/{path}", data, timeout=10) as answer:
            return json.load(answer)


@contextmanager
def running(upstream: str, log: Path) -> Iterator[FaultyS3]:
    """A proxy process on this host, before the server at `upstream` (`host:port`); it ends with the block."""
    listen, control = (f"127.0.0.1:{_free_port()}" for _ in range(2))
    command = [sys.executable, "-m", "tests.faulty_s3", "--listen", listen, "--upstream", upstream]
    with open(log, "wb") as file:
        process = subprocess.Popen([*command, "--control", control], stdout=file, stderr=file)
    proxy = FaultyS3(control, f"http://{listen}")
    try:
        for _ in range(300):
            try:
                proxy.counts()
                break
            except OSError:
                assert process.poll() is None, f"the proxy ended while starting: {log.read_text()}"
                time.sleep(0.1)
        else:
            raise AssertionError("the proxy did not answer within 30 s")
        yield proxy
    finally:
        process.kill()
        process.wait(10)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A proxy that makes an S3 server ill on command.")
    for option in ("--listen", "--upstream", "--control"):
        parser.add_argument(option, required=True, metavar="HOST:PORT")
    options = parser.parse_args()
    asyncio.run(Proxy(options.upstream).serve(options.listen, options.control))
