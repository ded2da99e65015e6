"""A real browser, driven through Chromium's own debugging protocol: pages, keys, clicks, and what it complains of."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
from websockets.sync.client import ClientConnection, connect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_PATIENCE_S = 30.0
_KEYS = {"Enter": (13, "\r"), "Tab": (9, ""), "Space": (32, " ")}


class Tab:
    """One page. What it logs as an error, and what it throws, is kept in `complaints`."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket, self._ids = socket, itertools.count(1)
        self.complaints: list[str] = []
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **values: Any) -> dict[str, Any]:
        """The result of one command."""
        number = next(self._ids)
        self._socket.send(json.dumps({"id": number, "method": method, "params": values}))
        while True:
            message = json.loads(self._socket.recv(timeout=_PATIENCE_S))
            if message.get("id") == number:
                assert "error" not in message, (method, message)
                result: dict[str, Any] = message["result"]
                return result
            self._hear(message)

    def _hear(self, message: dict[str, Any]) -> None:
        values = message.get("params", {})
        if message["method"] == "Runtime.exceptionThrown":
            self.complaints.append(str(values["exceptionDetails"]))
        elif message["method"] == "Log.entryAdded" and values["entry"]["level"] == "error":
            self.complaints.append(f"{values['entry']['source']}: {values['entry']['text']}")

    def open(self, url: str) -> None:
        """Go there, and wait until it is loaded."""
        self.send("Page.navigate", url=url)
        self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    def run(self, script: str) -> Any:
        """The value of an expression."""
        found = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def until(self, script: str) -> Any:
        """The value of an expression, once it is true."""
        over_s = time.monotonic() + _PATIENCE_S
        while not (found := self.run(script)):
            assert time.monotonic() < over_s, f"never true: {script}\n{self.run('document.body.innerText')}"
            time.sleep(0.02)
        return found

    def text(self, selector: str) -> str:
        """What is shown there."""
        return str(self.run(f"document.querySelector({json.dumps(selector)}).innerText"))

    def texts(self, selector: str) -> list[str]:
        found: list[str] = self.run(f"[...document.querySelectorAll({json.dumps(selector)})].map(e => e.innerText)")
        return found

    def click(self, selector: str) -> None:
        """With the mouse, in the middle of it."""
        element = f"document.querySelector({json.dumps(selector)})"
        self.run(f"{element}.scrollIntoView({{block: 'center'}})")
        x, y = self.run(f"(r => [r.x + r.width / 2, r.y + r.height / 2])({element}.getBoundingClientRect())")
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def fill(self, selector: str, text: str) -> None:
        """Click into a field, and type in place of what is there."""
        self.click(selector)
        self.run(f"document.querySelector({json.dumps(selector)}).select()")
        self.type(text) if text else self.run("document.execCommand('delete')")

    def type(self, text: str) -> None:
        """Into what has the focus."""
        self.send("Input.insertText", text=text)

    def press(self, key: str) -> None:
        number, text = _KEYS[key]
        values = {"key": key if key != "Space" else " ", "code": key, "windowsVirtualKeyCode": number}
        self.send("Input.dispatchKeyEvent", type="keyDown", text=text, **values)
        self.send("Input.dispatchKeyEvent", type="keyUp", **values)

    def focused(self) -> str:
        """The id of what has the focus."""
        return str(self.run("document.activeElement.id"))


@contextmanager
def browser(folder: Path) -> Iterator[Tab]:
    """One tab of a browser of its own."""
    assert CHROMIUM is not None
    command = [
        *(CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--lang=en"),
        *("--disable-dev-shm-usage", f"--user-data-dir={folder}/profile", "--window-size=1280,900"),
        *("--remote-debugging-port=0", "about:blank"),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        address = f"http://127.0.0.1:{_port(folder / 'profile' / 'DevToolsActivePort', process)}"
        (page,) = [page for page in httpx2.get(f"{address}/json").json() if page["type"] == "page"]
        with connect(page["webSocketDebuggerUrl"], max_size=None, open_timeout=_PATIENCE_S, proxy=None) as socket:
            yield Tab(socket)
    finally:
        process.terminate()
        process.wait(20)


def _port(file: Path, process: subprocess.Popen[bytes]) -> int:
    over_s = time.monotonic() + 2 * _PATIENCE_S
    while True:
        assert process.poll() is None, "the browser ended"
        assert time.monotonic() < over_s, "the browser did not start"
        lines = file.read_text().splitlines() if file.exists() else []
        if len(lines) > 1:
            return int(lines[0])
        time.sleep(0.05)
