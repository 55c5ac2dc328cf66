"""Work for the disk beside the training loop, on the main process of a job."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Background:
    """One action at a time, on a thread of its own that no end of the process waits for."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def is_busy(self) -> bool:
        """Whether an action runs."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, action: Callable[[], object]) -> None:
        """Begin an action; the one before it must be over, and :meth:`check` have been called."""
        assert not self.is_busy
        self._thread = threading.Thread(target=self._run, args=(action,), daemon=True)
        self._thread.start()

    def check(self) -> bool:
        """Whether the last action is over; raises, once, what it has raised."""
        if self.is_busy:
            return False
        error, self._error = self._error, None
        if error is not None:
            raise error
        return True

    def join(self, seconds: float) -> bool:
        """Wait for the end of the action for so long; whether it is over."""
        if self._thread is not None:
            self._thread.join(seconds)
        return not self.is_busy

    def _run(self, action: Callable[[], object]) -> None:
        try:
            action()
        except BaseException as error:
            self._error = error
