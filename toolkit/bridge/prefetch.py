"""Records read ahead, on a thread beside the training loop, where no step waits for them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future

from toolkit.bridge.payload import Record

_PAUSE_SECONDS = 10.0  # between two looks, at most: no step waits for them
_END_SECONDS = 5.0  # a process that ends while a thread is inside of torch is aborted


class Prefetch:
    """Reads the records that a job will ask for next as soon as they are there.

    It changes when a record is read, and nothing else: what the disk refused is read again, by who
    asks for it, and a record that was refused is refused there. It begins with the first record
    that is asked for, and looks the less often the longer nothing has come.

    Args:
        find: the job and the number of each record that is there and will be asked for next. Called
            on the thread.
        read: reads and verifies one.
    """

    def __init__(
        self,
        find: Callable[[], Iterable[tuple[str, int]]],
        read: Callable[[str, int], Record],
    ) -> None:
        self._find, self._read = find, read
        self._found: dict[str, tuple[int, Future[Record]]] = {}  # by job, the newest one
        self._taken: dict[str, int] = {}  # by job, the newest number that was asked for
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def read(self, job: str, sequence: int) -> Record:
        """A record; raises as ``read`` does."""
        self._taken[job] = sequence
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)
            self._thread.start()
        number, future = self._found.get(job, (-1, None))
        if future is not None and number == sequence:
            self._found.pop(job, None)
            try:
                return future.result()  # it may be on its way
            except OSError:
                pass
        return self._read(job, sequence)

    def stop(self) -> None:
        """End the thread, once it has read what it is reading; wait for that, but not for ever."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(_END_SECONDS)
        self._found.clear()

    def _run(self) -> None:
        since = time.monotonic()
        while not self._stop.is_set():
            if self._look():
                since = time.monotonic()
            waited = time.monotonic() - since
            self._stop.wait(min(_PAUSE_SECONDS, max(0.0005, 0.05 * waited)))

    def _look(self) -> bool:
        """Read what is there; whether there was something."""
        try:
            there = list(self._find())
        except OSError:
            return False
        news = False
        for job, sequence in there:
            known = self._found.get(job, (-1, None))[0]
            if sequence in (known, self._taken.get(job)):
                continue
            news, future = True, Future[Record]()
            self._found[job] = sequence, future
            try:
                future.set_result(self._read(job, sequence))
            except BaseException as error:
                future.set_exception(error)
                if isinstance(error, OSError):  # look again
                    self._found.pop(job, None)
        return news
