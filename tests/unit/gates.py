"""A stream whose publishing is held up, or fails."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from toolkit.bridge.transport import DirectoryTransport

PATIENCE_SECONDS = 30.0  # of this test, where something hangs


class Gate:
    """Holds the publishing of one stream up while it is closed; counts what goes through."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stream: str) -> None:
        self._open = threading.Event()
        self._open.set()
        self.error: OSError | None = None
        self.has_failed = threading.Event()
        publish = DirectoryTransport.publish

        def held(transport: DirectoryTransport, job: str, *args: Any) -> int:
            if job == stream:
                assert self._open.wait(PATIENCE_SECONDS)
                if self.error is not None:
                    self.has_failed.set()
                    raise self.error
            return publish(transport, job, *args)

        monkeypatch.setattr(DirectoryTransport, "publish", held)

    def close(self) -> None:
        self._open.clear()

    def open(self) -> None:
        self._open.set()
