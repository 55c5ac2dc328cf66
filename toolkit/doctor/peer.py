"""A second process for ``gradient-bridge doctor``, which plays the other job.

It is told what to do in lines of JSON and answers in such lines.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import toolkit
from toolkit.bridge import files
from toolkit.bridge.polling import pause

GIVE_UP_SECONDS = 10.0  # for what should be there at once
STREAM = "doctor"
LAST = b"last"
Exclusive = Literal["link", "create", "mkdir"]


class Peer:
    """The second process, as the first one sees it. Ends with the block that it is used in.

    Args:
        root: the directory in which both work; must exist, with the stream opened.
    """

    def __init__(self, root: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "toolkit.doctor.peer", str(root.absolute())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,  # so that what has come can be waited for
            cwd=Path(toolkit.__file__).parent.parent,  # so that it is this package that it runs
            start_new_session=True,  # Ctrl-C is for the first process, which ends this one
        )
        self._lines = b""
        self._selector = selectors.DefaultSelector()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        self._selector.register(self._stdout, selectors.EVENT_READ)

    def tell(self, task: str, *arguments: object) -> None:
        """Give it something to do, and come back once it begins."""
        self._stdin.write(json.dumps([task, *arguments]).encode() + b"\n")
        self.answer()

    def answer(self) -> Any:
        """What it answers.

        Raises:
            OSError: if it ends, or nothing comes in time.
        """
        while b"\n" not in self._lines:
            if not self._selector.select(2 * GIVE_UP_SECONDS):
                raise TimeoutError(f"no answer of a second process for {2 * GIVE_UP_SECONDS:g} s")
            if not (more := self._stdout.read(2**16)):
                raise ChildProcessError(f"a second process ended, status {self._process.wait()}")
            self._lines += more
        line, _, self._lines = self._lines.partition(b"\n")
        return json.loads(line)

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self._selector.close()
        self._process.kill()
        self._process.communicate()


def create_exclusively(kind: Exclusive, path: Path, source: Path) -> bool:
    """Make a name that must not exist yet; whether this call did it.

    Args:
        kind: of the call.
        path: the name.
        source: a file, which the name is linked to.
    """
    try:
        if kind == "link":
            os.link(source, path)
        elif kind == "mkdir":
            path.mkdir()
        else:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    return True


def race(kind: Exclusive, root: Path, source: Path, seconds: float, num_names: int) -> list[bool]:
    """Make names that another process makes too, for so long; for each, whether this one did."""
    deadline = time.monotonic() + seconds
    won: list[bool] = []
    while len(won) < num_names and (not won or time.monotonic() < deadline):
        won.append(create_exclusively(kind, root / f"{kind}-{len(won)}", source))
    return won


def _say(answer: object) -> None:
    print(json.dumps(answer), flush=True)


def _see(path: Path) -> bool:
    """Wait for a record as a reader of the bridge does: by its name, which it knows."""
    start = time.monotonic()
    while (waited := time.monotonic() - start) < GIVE_UP_SECONDS:
        with contextlib.suppress(FileNotFoundError):
            files.read_plain(path)
            return True
        pause(waited)
    return False


def _watch_replaced(path: Path) -> tuple[int, int]:
    """Read a file that is replaced all the time; how often, and how often it was not whole."""
    start = time.monotonic()
    num_reads = num_torn = 0
    while time.monotonic() - start < GIVE_UP_SECONDS:
        try:
            content = path.read_bytes()
        except OSError:
            content = b""
        if content == LAST:
            break
        num_reads += 1
        num_torn += len(content) == 0 or content != content[:1] * len(content)
    return num_reads, num_torn


def main(root: Path) -> None:
    """Do what the other process says until it says no more."""
    tasks: dict[str, Callable[..., object]] = {
        "see": lambda name: _see(root / name),
        "race": lambda kind, source, seconds, num_names: race(
            kind, root, root / source, seconds, num_names
        ),
        "watch": lambda name: _watch_replaced(root / name),
    }
    for line in sys.stdin:
        task, *arguments = json.loads(line)
        _say("ready")
        _say(tasks[task](*arguments))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
