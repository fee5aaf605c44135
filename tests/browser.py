"""A headless Chromium, spoken to in the DevTools protocol over two pipes: no package is needed for that."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TIMEOUT_SECONDS = 60.0
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)
DEAF = ("Network.requestWillBeSent", "Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")


def chromium() -> str | None:
    """Where one is installed."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Tab:
    """One open page. events: what it told, by method."""

    def __init__(self, reading: int, writing: int) -> None:
        self._reading, self._writing, self._rest, self._number = reading, writing, b"", 0
        self._session: str | None = None
        self.events: dict[str, list[dict[str, Any]]] = {method: [] for method in DEAF}
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command of the protocol, and its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._writing, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._message()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return dict(answer["result"])
            self.events.setdefault(answer.get("method", ""), []).append(answer.get("params", {}))

    def evaluate(self, expression: str) -> Any:
        """The value of an expression of JavaScript, awaited."""
        result = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def open(self, path: Path, width: int, height: int = 900, scheme: str = "light") -> None:
        """A file, in a window of this size; until its script has set data-ready."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("Page.navigate", url=path.resolve().as_uri())
        self.wait("document.documentElement?.dataset.ready === 'true'")

    def wait(self, condition: str) -> None:
        end = time.monotonic() + TIMEOUT_SECONDS
        while not self.evaluate(condition):
            assert time.monotonic() < end, f"{condition} did not come true: {self.complaints}"
            time.sleep(0.1)

    @property
    def complaints(self) -> list[str]:
        """Errors and warnings of scripts and of the browser."""
        texts = [str(one["exceptionDetails"]) for one in self.events["Runtime.exceptionThrown"]]
        texts += [str(one["args"]) for one in self.events["Runtime.consoleAPICalled"] if one["type"] != "log"]
        return texts + [str(one["entry"]) for one in self.events["Log.entryAdded"]]

    @property
    def requests(self) -> list[str]:
        """What was asked for."""
        return [one["request"]["url"] for one in self.events["Network.requestWillBeSent"]]

    def screenshot(self, path: Path, *, whole: bool = True) -> None:
        result = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(result["data"]))

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            read = os.read(self._reading, 1 << 16)
            assert read, "the browser ended"
            self._rest += read
        line, _, self._rest = self._rest.partition(b"\0")
        return dict(json.loads(line))


@contextmanager
def tab(folder: Path) -> Iterator[Tab]:
    """A page of a browser of its own. folder: for its profile."""
    executable = chromium()
    assert executable is not None
    to_browser, from_browser = os.pipe(), os.pipe()

    def numbers() -> None:
        """The browser reads 3 and writes 4."""
        reading, writing = os.dup(to_browser[0]), os.dup(from_browser[1])
        os.dup2(reading, 3)
        os.dup2(writing, 4)

    process = subprocess.Popen(
        [executable, *FLAGS, f"--user-data-dir={folder}"],
        pass_fds=(3, 4),
        preexec_fn=numbers,
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    os.close(to_browser[0])
    os.close(from_browser[1])
    try:
        yield Tab(from_browser[0], to_browser[1])
    finally:
        process.terminate()
        process.wait(TIMEOUT_SECONDS)
        os.close(to_browser[1])
        os.close(from_browser[0])
