"""Counts what this process asks of a file system by name, and simulates hours of waiting."""

from __future__ import annotations

import builtins
import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from toolkit.bridge import control, inbox, liveness, polling, resting, teachers

_BY_NAME = (
    "open", "stat", "lstat", "listdir", "scandir", "rename", "replace", "unlink", "remove", "link",
    "mkdir", "rmdir", "chmod", "access", "readlink",
)  # fmt: skip


class MetadataCounter:
    """Counts the operations of this thread on names below ``root``."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_operations = 0
        self.names: list[str] = []
        self._root, self._thread = str(root), threading.get_ident()
        for name in _BY_NAME:
            monkeypatch.setattr(os, name, self._counting(name, getattr(os, name)))
        monkeypatch.setattr(builtins, "open", self._counting("open", builtins.open))

    def _counting(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(path: Any = ".", *args: Any, **kwargs: Any) -> Any:
            is_here = threading.get_ident() == self._thread and not isinstance(path, int)
            if is_here and str(path).startswith(self._root):
                self.num_operations += 1
                self.names.append(f"{name} {str(path)[len(self._root) :]}")
            return function(path, *args, **kwargs)

        return counted


class SimulatedTime:
    """A clock for waits that moves when they sleep, and does what was put down for a time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        self._planned: list[tuple[float, Callable[[], object]]] = []
        clock = SimpleNamespace(monotonic=lambda: self.now, sleep=self.sleep)
        for module in (control, inbox, liveness, polling, resting, teachers):
            monkeypatch.setattr(module, "time", clock)

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        due = [action for at, action in self._planned if at <= self.now]
        self._planned = [(at, action) for at, action in self._planned if at > self.now]
        for action in due:
            action()

    def after(self, seconds: float, action: Callable[[], object]) -> None:
        self._planned.append((self.now + seconds, action))
