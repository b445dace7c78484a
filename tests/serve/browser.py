"""A headless Chromium for tests, without any library: its DevTools protocol over two pipes."""

import base64
import fcntl
import itertools
import json
import os
import select
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
WHY_NOT = "there is no Chromium, or no bash to start it" if not (CHROMIUM and shutil.which("bash")) else ""
PATIENCE_S = 120.0
OPTIONS = (
    *("--headless", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--remote-debugging-pipe"),
    *("--disable-background-networking", "--disable-component-update", "--hide-scrollbars"),
    *("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"),
)
KEYS = {"Tab": (9, ""), "Enter": (13, "\r"), "Space": (32, " "), "ArrowRight": (39, ""), "ArrowDown": (40, "")}


class Browser:
    """One page, in a process of its own.

    said: errors of the page and what its policy forbade. asked: the addresses of all its requests.
    """

    def __init__(self, folder: Path) -> None:
        assert CHROMIUM is not None
        ours, self._to = os.pipe()
        self._from, theirs = os.pipe()
        # the protocol reads file descriptor 3 and writes 4; bash puts them there, from above both
        high = [fcntl.fcntl(each, fcntl.F_DUPFD, 10) for each in (ours, theirs)]
        os.close(ours)
        os.close(theirs)
        root = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium refuses its sandbox to root
        command = shlex.join([CHROMIUM, *OPTIONS, *root, f"--user-data-dir={folder}"])
        self.process = subprocess.Popen(
            ["bash", "-c", f"exec {command} 3<&{high[0]} 4>&{high[1]}"],
            pass_fds=high,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for each in high:
            os.close(each)
        self.said: list[str] = []
        self.asked: list[str] = []
        self._ids, self._waiting, self._session = itertools.count(1), b"", ""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "DOM", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of a method of the protocol."""
        number = next(self._ids)
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session and not method.startswith("Browser.") else {}
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while (found := self._message()).get("id") != number:
            self._note(found)
        assert "error" not in found, (method, found)
        return found["result"]

    def _note(self, event: dict[str, Any]) -> None:
        more = event.get("params", {})
        if event.get("method") == "Log.entryAdded":
            self.said.append(more["entry"]["text"])
        elif event.get("method") == "Runtime.exceptionThrown":
            self.said.append(json.dumps(more["exceptionDetails"]))
        elif event.get("method") == "Network.requestWillBeSent":
            self.asked.append(more["request"]["url"])

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self._waiting:
            ready, _, _ = select.select([self._from], [], [], PATIENCE_S)
            assert ready, "the browser does not answer"
            part = os.read(self._from, 1 << 20)
            assert part, "the browser has ended"
            self._waiting += part
        whole, _, self._waiting = self._waiting.partition(b"\0")
        return json.loads(whole)

    def open(self, address: str, ready: str) -> None:
        """Go to a page, and wait for a condition there."""
        self.call("Page.navigate", url=address)
        self.until(ready)

    def run(self, script: str) -> Any:
        """The value of an expression in the page; a promise is waited for."""
        found = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True, userGesture=True
        )
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, condition: str) -> None:
        """Wait for a condition in the page."""
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end:
            # while a page is loaded, its names are missing
            if self.run(f"(() => {{ try {{ return Boolean({condition}); }} catch {{ return false; }} }})()"):
                return
            time.sleep(0.02)
        raise AssertionError(f"{condition} never came; the page has: {self.run('document.body.innerText')}")

    def upload(self, selector: str, file: Path) -> None:
        """Choose a file in an input."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(file)])

    def type(self, text: str) -> None:
        """Type into what has the focus."""
        self.call("Input.insertText", text=text)

    def press(self, key: str) -> None:
        """Press a key of KEYS."""
        code, text = KEYS[key]
        same = {"key": text if key == "Space" else key, "code": key, "windowsVirtualKeyCode": code}
        self.call("Input.dispatchKeyEvent", type="keyDown", **same, **({"text": text} if text else {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **same)

    def stroke(self, points: Iterable[tuple[float, float]], *, finger: bool = False) -> None:
        """Draw through these points of the window with the mouse, or a finger."""
        points = list(points)
        for i, (x, y) in enumerate([*points, points[-1]]):
            state = "first" if i == 0 else "last" if i == len(points) else "between"
            if finger:
                kind = {"first": "touchStart", "between": "touchMove", "last": "touchEnd"}[state]
                where = [] if state == "last" else [{"x": x, "y": y}]
                self.call("Input.dispatchTouchEvent", type=kind, touchPoints=where)
            else:
                kind = {"first": "mousePressed", "between": "mouseMoved", "last": "mouseReleased"}[state]
                self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1)

    def box(self, selector: str) -> tuple[float, float, float, float]:
        """Left, top, width and height of an element in the window, after it was scrolled into view."""
        return tuple(
            self.run(
                f"(() => {{ const e = document.querySelector({selector!r}); e.scrollIntoView({{ block: 'center' }});"
                " const r = e.getBoundingClientRect(); return [r.left, r.top, r.width, r.height]; })()"
            )
        )

    def size(self, width: int, height: int, *, dark: bool = False, touch: bool = False) -> None:
        """Make the window of this size in CSS pixels."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Emulation.setTouchEmulationEnabled", enabled=touch)

    def picture(self) -> bytes:
        """A PNG of the whole page."""
        return base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"])

    def close(self) -> None:
        """End the process."""
        self.process.terminate()
        self.process.wait(PATIENCE_S)
        os.close(self._to)
        os.close(self._from)
