"""A headless Chromium, spoken to through a pipe by the DevTools protocol, and TensorBoard."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
TIMEOUT = 120.0  # seconds, for a hang only
_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--window-size=1500,1500", "--remote-debugging-pipe"),
)
# All elements, those in shadow trees too.
_ALL = """
const all = (root) => [...root.querySelectorAll('*')].flatMap(
    (element) => [element, ...(element.shadowRoot ? all(element.shadowRoot) : [])]);
"""


class Page:
    """A page of a running Chromium.

    Args:
        to_browser: file descriptor of the pipe's one end.
        from_browser: of the other one's.
    """

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._to, self._from = to_browser, from_browser
        self._number, self._unread = 0, b""
        self._session: dict[str, str] = {}
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        attached = self._ask("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": attached["sessionId"]}

    def open(self, url: str) -> None:
        """Go to a page anew, also where only what follows its ``#`` differs."""
        self._ask("Page.navigate", url="about:blank")
        self._ask("Page.navigate", url=url)

    def ask(self, script: str) -> Any:
        """The value of an expression, in which ``all(document)`` are all elements."""
        answer = self._ask(
            "Runtime.evaluate", expression=f"(() => {{{_ALL} return {script}}})()",
            returnByValue=True,
        )  # fmt: skip
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait_for(self, script: str) -> Any:
        """The value of an expression, once it is true."""
        deadline = time.monotonic() + TIMEOUT
        while not (value := self.ask(script)):
            assert time.monotonic() < deadline, f"the page never showed: {script}\n{self.texts()}"
            time.sleep(0.2)
        return value

    def wait_for_texts(self, *texts: str) -> None:
        """Wait until each of these is the whole text of some element."""
        wanted = json.dumps(texts)
        self.wait_for(
            "((found) => " + wanted + ".every((text) => found.has(text)))"
            "(new Set(all(document).map((element) => element.textContent.trim())))"
        )

    def texts(self) -> list[str]:
        """The texts of all elements that have no others in them."""
        found: list[str] = self.ask(
            "all(document).filter((e) => !e.childElementCount && !e.shadowRoot "
            "&& !['STYLE', 'SCRIPT'].includes(e.tagName))"
            ".map((e) => e.textContent.trim()).filter((text) => text)"
        )
        return found

    def _ask(self, method: str, **parameters: Any) -> Any:
        self._number += 1
        question = {"id": self._number, "method": method, "params": parameters, **self._session}
        os.write(self._to, json.dumps(question).encode() + b"\0")
        while True:
            while b"\0" not in self._unread:
                received = os.read(self._from, 2**20)
                assert received, "Chromium has ended"
                self._unread += received
            message, self._unread = self._unread.split(b"\0", 1)
            answer = json.loads(message)
            if answer.get("id") == self._number:
                assert "error" not in answer, answer["error"]
                return answer["result"]


@contextlib.contextmanager
def chromium(directory: Path) -> Iterator[Page]:
    """A browser with one page, which ends with the block.

    Args:
        directory: for its profile.
    """
    assert CHROMIUM is not None
    its_input, to_browser = os.pipe()
    from_browser, its_output = os.pipe()
    command = [CHROMIUM, *_FLAGS, f"--user-data-dir={directory / 'profile'}"]
    # It reads descriptor 3 and writes 4.
    redirected = f'exec "$0" "$@" 3<&{its_input} 4>&{its_output}'
    with (directory / "chromium.log").open("wb") as log:
        browser = subprocess.Popen(
            ["bash", "-c", redirected, *command],
            pass_fds=(its_input, its_output),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    os.close(its_input)
    os.close(its_output)
    try:
        yield Page(to_browser, from_browser)
    finally:
        _end(browser)
        os.close(to_browser)
        os.close(from_browser)


@contextlib.contextmanager
def tensorboard(logdir: Path, directory: Path) -> Iterator[str]:
    """A TensorBoard on a free port, which ends with the block; its address.

    Args:
        logdir: what it shows.
        directory: for its log.
    """
    log = directory / "tensorboard.log"
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir)]
    with log.open("wb") as stream:
        server = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", "0"],
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
        )
    try:
        deadline = time.monotonic() + TIMEOUT
        while not (address := re.search(r"http://127\.0\.0\.1:\d+", log.read_text())):
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield address.group()
    finally:
        _end(server)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and what it has started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    process.kill()
    process.wait()
