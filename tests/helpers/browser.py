"""A headless Chromium, driven over its own debugging pipe: no driver and no package is needed.

Messages of the DevTools protocol are JSON with a NUL between; the browser reads them from file 3 and writes to file 4.
"""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
# Nothing but the page: no sandbox for root, no GPU, and no call home.
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--remote-debugging-pipe",
)
PATIENCE = 60.0
_LAUNCH = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.dup2(int(sys.argv[2]), 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


def find_browser() -> str | None:
    """Path of the browser, if there is one."""
    return next(filter(None, map(shutil.which, NAMES)), None)


def browser_test(function):
    """Marks a test that opens pages; it is skipped where there is no browser."""
    reason = f"needs a browser, none of {', '.join(NAMES)} is on the PATH: `make browser` installs one"
    return pytest.mark.browser(pytest.mark.skipif(find_browser() is None, reason=reason)(function))


# Every picture that did not load, and every box that is too small for what is in it or reaches out of the window.
_BROKEN = (
    """[...document.images].filter(image => !image.complete || image.naturalWidth === 0).map(image => image.alt)"""
)
_OVERFLOWING = """
    [document.documentElement, ...document.body.querySelectorAll("*")]
        .filter(box => getComputedStyle(box).display !== "inline")
        .filter(box => box.scrollWidth > box.clientWidth || box.getBoundingClientRect().right > innerWidth + 1)
        .map(box => `${box.tagName} ${box.className}: ${box.scrollWidth} in ${box.clientWidth}`)
"""


def check_page(path: Path, profile: Path, pictures: int) -> None:
    """Opens a page as on a desk and as on a phone: all pictures load, nothing overflows, nothing fails."""
    with Browser(profile) as browser:
        for width in (1280, 400):
            browser.open(path, width)
            assert browser.evaluate("innerWidth") == width
            assert browser.evaluate("document.images.length") == pictures
            assert browser.evaluate(_BROKEN) == []
            assert browser.evaluate(_OVERFLOWING) == []
        assert browser.errors == []


class Browser:
    """One browser with one page, closed at the end of a `with` block.

    Args:
        profile: an empty folder for what it keeps.

    Attributes:
        errors: texts of the page's errors: exceptions, console.error, and what could not be loaded.
    """

    def __init__(self, profile: Path):
        self._log = profile / "browser.log"
        to_browser, self._write = os.pipe()
        self._read, from_browser = os.pipe()
        # Out of the way of the numbers that they get in the end.
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (to_browser, from_browser)]
        command = [find_browser(), *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        with open(self._log, "wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-S", "-c", _LAUNCH, *map(str, ends), *command],
                pass_fds=ends,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        for end in (to_browser, from_browser, *ends):
            os.close(end)
        self._buffer, self._number, self._events = b"", 0, []
        self.errors: list[str] = []

    def __enter__(self) -> "Browser":
        try:
            targets = self._call("Target.getTargets", session=None)["targetInfos"]
            page = next(target["targetId"] for target in targets if target["type"] == "page")
            attached = self._call("Target.attachToTarget", session=None, targetId=page, flatten=True)
            self._session = attached["sessionId"]
            for domain in ("Page", "Runtime", "Log"):
                self._call(f"{domain}.enable")
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_) -> None:
        try:
            self._call("Browser.close", session=None)
            self._process.wait(PATIENCE)
        finally:
            self._stop()

    def _stop(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._write)
        os.close(self._read)

    def open(self, path: Path, width: int, height: int = 900) -> None:
        """Opens a page in a window of this size, and waits until it and its pictures are loaded."""
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self._events.clear()
        self._call("Page.navigate", url=path.resolve().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            self._receive()

    def evaluate(self, expression: str):
        """The value of a JavaScript expression."""
        reply = self._call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in reply:
            raise RuntimeError(reply["exceptionDetails"]["exception"]["description"])
        return reply["result"].get("value")

    def screenshot(self, path: Path) -> None:
        """Writes the whole page as PNG."""
        data = self._call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))

    def _call(self, method: str, session: str | None = "", **parameters) -> dict:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._write, data) :]
        while True:
            reply = self._receive()
            if reply.get("id") == self._number:
                if "error" in reply:
                    raise RuntimeError(f"{method}: {reply['error']['message']}")
                return reply["result"]

    def _receive(self) -> dict:
        """The next message; events are kept, and errors among them noted."""
        end = time.monotonic() + PATIENCE
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(0.0, end - time.monotonic()))
            data = os.read(self._read, 1 << 20) if ready else b""
            if not data:
                raise RuntimeError(f"the browser must answer, got nothing more; it said: {self._log.read_text()}")
            self._buffer += data
        text, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(text)
        if "method" in message:
            self._events.append(message)
            self._note(message["method"], message["params"])
        return message

    def _note(self, method: str, parameters: dict) -> None:
        if method == "Runtime.exceptionThrown":
            self.errors.append(parameters["exceptionDetails"]["text"])
        elif method == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "assert"):
            self.errors.append(" ".join(str(argument.get("value")) for argument in parameters["args"]))
        elif method == "Log.entryAdded" and parameters["entry"]["level"] == "error":
            self.errors.append(parameters["entry"]["text"])
