"""Headless Chromium, driven over its debugging pipe: pages at any width and theme, and the errors that they report."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_SECONDS = 60.0


class Page:
    """One page. `problems` are script errors and console messages, `requests` are the URLs that it has requested."""

    def __init__(self, read: int, write: int):
        self._read, self._write = read, write
        self._buffer = b""
        self._number = 0
        self._session: str | None = None
        self.problems: list[str] = []
        self.requests: list[str] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def open(self, path: Path, width: int, dark: bool = False, height: int = 900) -> None:
        """Load a local file in a window of the given width in CSS pixels, and wait until it has loaded."""
        self.problems.clear()
        self.requests.clear()
        phone = width < 600
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        self._prefer(dark)
        self.send("Page.navigate", url=path.resolve().as_uri())
        self._until("Page.loadEventFired")

    def theme(self, dark: bool) -> None:
        """Change the theme that the reader prefers, and wait until the page has applied it."""
        self._prefer(dark)
        self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done())))")

    def _prefer(self, dark: bool) -> None:
        value = "dark" if dark else "light"
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": value}])

    def run(self, script: str) -> Any:
        """The JSON value of an expression in the page, or of the promise that it returns."""
        told = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in told, told
        return told["result"].get("value")

    def picture(self, file: Path, top: int = 0, height: int = 0) -> None:
        """Write the whole page, or `height` pixels of it from `top`, to a PNG file."""
        size = self.send("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": top, "width": size["width"], "height": height or size["height"], "scale": 1}
        told = self.send("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        file.write_bytes(base64.b64decode(told["data"]))

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command of the DevTools protocol and return its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            told = self._next()
            if told.get("id") == self._number:
                assert "error" not in told, told
                return dict(told["result"])

    def _until(self, method: str) -> None:
        while self._next().get("method") != method:
            pass

    def _next(self) -> dict[str, Any]:
        """The next message; errors and requests that it reports are recorded."""
        deadline = time.monotonic() + _SECONDS
        while b"\0" not in self._buffer:
            assert select.select([self._read], [], [], max(deadline - time.monotonic(), 0))[0], "Chromium is silent"
            part = os.read(self._read, 1 << 20)
            assert part, "Chromium has ended"
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\0")
        told: dict[str, Any] = json.loads(line)
        about = told.get("params", {})
        if told.get("method") == "Runtime.exceptionThrown":
            details = about["exceptionDetails"]
            self.problems.append(str(details.get("exception", {}).get("description") or details["text"]))
        elif told.get("method") == "Runtime.consoleAPICalled" and about["type"] in ("error", "warning", "assert"):
            self.problems.append(" ".join(str(argument.get("value")) for argument in about["args"]))
        elif told.get("method") == "Log.entryAdded" and about["entry"]["level"] in ("error", "warning"):
            self.problems.append(about["entry"]["text"])
        elif told.get("method") == "Network.requestWillBeSent":
            self.requests.append(about["request"]["url"])
        return told


@contextmanager
def browser() -> Iterator[Page]:
    """A page of a new Chromium process, which is killed at the end of the block."""
    assert CHROMIUM is not None
    to_it, mine_out = os.pipe()
    mine_in, from_it = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        # Chromium reads commands from descriptor 3 and writes messages to descriptor 4.
        start = f'exec "$0" "$@" 3<&{to_it} 4>&{from_it}'
        options = [
            "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe",
            "--no-first-run", "--disable-background-networking", f"--user-data-dir={profile}", "about:blank",
        ]  # fmt: skip
        process = subprocess.Popen(
            ["bash", "-c", start, CHROMIUM, *options], pass_fds=(to_it, from_it), start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_it)
        os.close(from_it)
        try:
            yield Page(mine_in, mine_out)
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # with the renderers, which are in its process group
            process.wait(10)
            os.close(mine_in)
            os.close(mine_out)
