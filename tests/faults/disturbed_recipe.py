"""Run a recipe on a disk and a clock that fail when the test says so.

    accelerate launch tests/faults/disturbed_recipe.py DIRECTORY RECIPE [FLAGS ...]

While ``DIRECTORY/disk`` exists, calls on paths of a run's bridge directory do what it says:

* ``error NAME`` raises that error, for writes only where a disk that fails so can still be read;
* ``slow SECONDS`` takes so long;
* ``late LOOKS`` hides each record from the first so many tries to open it.

``DIRECTORY/clock`` holds what is added to the wall clock, in seconds; it may be changed at any
time. ``DIRECTORY/calls`` gets a line for each failed call.
"""

from __future__ import annotations

import errno
import functools
import io
import os
import re
import runpy
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

_RECORD = re.compile(r"/[0-9]{10}\.safetensors$")
WRITES_ONLY = {"ENOSPC", "EDQUOT", "EROFS"}
_WRITES = ("link", "replace", "rename", "unlink", "mkdir")
_READS = ("listdir", "scandir")


class Faults:
    """What the test wants now."""

    def __init__(self, directory: Path) -> None:
        self._directory, self._open = directory, io.open
        self._looks: Counter[str] = Counter()

    def _read(self, name: str) -> str:
        try:
            with self._open(self._directory / name) as file:
                return str(file.read())
        except FileNotFoundError:
            return ""

    def offset(self) -> float:
        """Seconds to add to the wall clock."""
        return float(self._read("clock") or 0.0)

    def strike(self, name: str, path: str, *, writes: bool) -> None:
        """Do what is wanted before a call on ``path``."""
        kind, _, value = self._read("disk").partition(" ")
        if kind == "slow":
            time.sleep(float(value))
        if kind == "late" and not writes and _RECORD.search(path):
            self._looks[path] += 1
            if self._looks[path] <= int(value):
                self._fail(errno.ENOENT, name, path)
        if kind == "error" and (writes or value not in WRITES_ONLY):
            self._fail(getattr(errno, value), name, path)

    def _fail(self, number: int, name: str, path: str) -> None:
        with self._open(self._directory / "calls", "a") as file:
            file.write(f"{name} {path}\n")
        raise OSError(number, os.strerror(number), path)


def _is_shared(path: object) -> bool:
    return isinstance(path, (str, os.PathLike)) and "/bridge" in os.fspath(path)


def install(faults: Faults) -> None:
    """Put the faults before the system's calls."""

    def wrap(module: Any, name: str, writes: Callable[..., bool]) -> None:
        original = getattr(module, name)

        @functools.wraps(original)
        def call(*args: Any, **options: Any) -> Any:
            for path in args[:2]:
                if _is_shared(path):
                    faults.strike(name, os.fspath(path), writes=writes(*args[1:], **options))
                    break
            return original(*args, **options)

        setattr(module, name, call)

    for name in _WRITES:
        wrap(os, name, lambda *args, **options: True)
    for name in _READS:
        wrap(os, name, lambda *args, **options: False)
    wrap(os, "open", lambda flags, *args, **options: flags & os.O_ACCMODE != os.O_RDONLY)
    wrap(io, "open", lambda mode="r", *args, **options: any(c in mode for c in "wax+"))
    now = time.time
    time.time = lambda: now() + faults.offset()


if __name__ == "__main__":
    directory, recipe = Path(sys.argv[1]), sys.argv[2]
    install(Faults(directory))
    sys.argv = sys.argv[2:]
    runpy.run_path(recipe, run_name="__main__")
