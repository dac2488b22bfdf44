"""A headless Chromium, driven through its DevTools protocol: true keys, true screenshots."""

import asyncio
import base64
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser")
PATIENCE = 60.0  # seconds; a busy machine starts it slowly
CODES = {"Enter": 13, "Tab": 9, "Escape": 27}


class Chromium:
    """One page."""

    def __init__(self, port: int) -> None:
        self.loop = asyncio.new_event_loop()
        self.number = 0
        self.loop.run_until_complete(self._connect(port))
        self("Page.enable")

    async def _connect(self, port: int) -> None:
        self.session = aiohttp.ClientSession()
        async with self.session.get(f"http://127.0.0.1:{port}/json/list") as answer:
            pages = [page for page in await answer.json() if page["type"] == "page"]
        self.socket = await self.session.ws_connect(
            pages[0]["webSocketDebuggerUrl"], max_msg_size=0
        )

    def __call__(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the protocol, and its result."""
        return self.loop.run_until_complete(
            asyncio.wait_for(self._send(method, parameters), PATIENCE)
        )

    async def _send(self, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
        self.number += 1
        await self.socket.send_json({"id": self.number, "method": method, "params": parameters})
        while True:
            told = json.loads((await self.socket.receive()).data)
            if told.get("id") == self.number:
                assert "error" not in told, told
                return told["result"]

    def js(self, expression: str) -> Any:
        """The value of an expression in the page."""
        found = self("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, expression: str) -> Any:
        """The value of an expression as soon as it is true."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            if found := self.js(expression):
                return found
            time.sleep(0.05)
        raise AssertionError(f"{expression} never came true: {self.js('document.body.innerText')}")

    def press(self, key: str) -> None:
        """Press and release a key."""
        about: dict[str, Any] = {"key": key, "windowsVirtualKeyCode": CODES.get(key, ord(key[0]))}
        text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
        self("Input.dispatchKeyEvent", type="keyDown", text=text, **about)
        self("Input.dispatchKeyEvent", type="keyUp", **about)

    def write(self, text: str) -> None:
        """Press one key after the other."""
        for key in text:
            self.press(key)

    def look(self, width: int, height: int, *, dark: bool = False, phone: bool = False) -> None:
        """Be a screen of this size."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": phone}
        self("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self("Emulation.setEmulatedMedia", features=[scheme])

    def picture(self, path: Path) -> None:
        """Write what is seen as PNG, once nothing moves."""
        self.until("document.getAnimations().length === 0")
        path.write_bytes(base64.b64decode(self("Page.captureScreenshot", format="png")["data"]))

    def close(self) -> None:
        self.loop.run_until_complete(self.socket.close())
        self.loop.run_until_complete(self.session.close())
        self.loop.close()


@contextmanager
def chromium(folder: Path) -> Iterator[Chromium]:
    """A browser with its profile in `folder`, ended after the block."""
    assert PROGRAM is not None
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    options += ["--no-first-run", "--remote-debugging-port=0", f"--user-data-dir={folder}"]
    process = subprocess.Popen(
        [PROGRAM, *options, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    port = folder / "DevToolsActivePort"
    try:
        deadline = time.monotonic() + PATIENCE
        while not (port.exists() and "\n" in port.read_text()):
            assert process.poll() is None, "chromium has ended"
            assert time.monotonic() < deadline, "chromium does not start"
            time.sleep(0.1)
        page = Chromium(int(port.read_text().split()[0]))
        yield page
        page.close()
    finally:
        process.terminate()
        process.wait(20)
