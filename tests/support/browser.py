"""A headless Chromium, driven through its pipe: no package is needed, only the program.

The environment variable CHROMIUM names it.
"""

from __future__ import annotations

import base64
import json
import os
import select
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

OPTIONS = (
    "--headless", "--no-sandbox", "--no-zygote", "--single-process", "--in-process-gpu",
    "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader",
    "--disable-features=IsolateOrigins,site-per-process", "--no-first-run",
    "--remote-debugging-pipe", "about:blank",
)  # fmt: skip
SECONDS = 60
# What a page complains about: exceptions, messages of the console, and what it could not load.
COMPLAINTS = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")


def find_chromium() -> str:
    """The program of the variable CHROMIUM; fails without one, because no test may pass unrun."""
    program = os.environ.get("CHROMIUM", "")
    if not program or not Path(program).is_file():
        pytest.fail(
            f"CHROMIUM: found {program!r}, expected the path of a Chromium program; install one, "
            "for example with `npm install @sparticuz/chromium`, and set the variable to it",
            pytrace=False,
        )
    return program


class Browser:
    """A browser with one page; use it as a context manager."""

    def __init__(self, profile: Path):
        to_read, self._to = os.pipe()
        self._from, to_write = os.pipe()
        # The program reads commands from descriptor 3, and writes answers to 4. Above them first,
        # because either pipe may have one of these numbers.
        high = [os.dup2(fd, 100 + fd) for fd in (to_read, to_write)]
        command = [find_chromium(), f"--user-data-dir={profile}", *OPTIONS]
        line = f'exec "$@" 3<&{high[0]} 4>&{high[1]} {high[0]}<&- {high[1]}>&-'
        self._process = subprocess.Popen(
            ["bash", "-c", line, "bash", *command], pass_fds=high, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        for fd in (to_read, to_write, *high):
            os.close(fd)
        self._number, self._rest = 0, b""
        self.events: list[dict[str, Any]] = []
        self._session: str | None = None
        target = next(
            t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page"
        )
        attached = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of a command of the DevTools protocol."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            # A page that shows a dialog answers no more.
            ready, _, _ = select.select([self._from], [], [], SECONDS)
            assert ready, f"the browser has not answered for {SECONDS} s"
            content = os.read(self._from, 1 << 16)
            assert content, "the browser has ended"
            self._rest += content
        text, _, self._rest = self._rest.partition(b"\0")
        return json.loads(text)

    def open(self, url: str, width: int, height: int) -> None:
        """Loads a page in a window of that size."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
            mobile=False,
        )  # fmt: skip
        self.events.clear()
        self.call("Page.navigate", url=url)
        end = time.monotonic() + SECONDS
        while self.evaluate("document.readyState + location.href") != f"complete{url}":
            assert time.monotonic() < end, f"{url} was not loaded in {SECONDS} s"
            time.sleep(0.05)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def list_complaints(self) -> list[dict[str, Any]]:
        """What the page has written to the console or thrown."""
        return [event for event in self.events if event.get("method") in COMPLAINTS]

    def list_requests(self) -> list[str]:
        """The addresses that were loaded, without those whose content is in the page."""
        urls = [
            event["params"]["request"]["url"]
            for event in self.events
            if event.get("method") == "Network.requestWillBeSent"
        ]
        return [url for url in urls if not url.startswith("data:")]

    def save_screenshot(self, path: Path) -> None:
        """Saves what the window shows as a PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._to)
        os.close(self._from)
