"""The small files of a run: who believes which of them.

With a key, all of them are signed as the records are: a forged note would lose a payload, a forged
acknowledgement delete one, a forged heartbeat keep a job waiting, a forged claim stand for a job
that never came. What no job of this run has signed is as if it were not there.
"""

from __future__ import annotations

import logging
from pathlib import Path

from toolkit.bridge import files
from toolkit.bridge.authentication import Signer
from toolkit.bridge.errors import PayloadError

logger = logging.getLogger(__name__)

_MAX_COUNTER_BYTES = 256  # of a file that holds one number, and its signature


class SignedFiles:
    """Files by their names below ``root``, such as ``donor/heartbeat``, which is signed with them.

    Args:
        root: the run's bridge directory.
        signer: of the run.
    """

    def __init__(self, root: Path, signer: Signer) -> None:
        self.root, self.signer = root, signer
        self._highest: dict[str, int] = {}  # counter seen, by name
        self._ignored: set[str] = set()  # names that a warning was given for
        self._modes: dict[Path, int] = {}  # of directories, looked up once: a heart beats for ever

    def create(self, name: str, content: bytes) -> None:
        """Create a file; durable when it returns.

        Raises:
            FileExistsError: if the name is taken, by whatever.
        """
        data = self.signer.seal(name, content)
        files.create(self.root / name, lambda temporary: temporary.write_bytes(data))

    def replace(self, name: str, content: bytes) -> None:
        """Give a file a new content; not durable."""
        path = self.root / name
        if path.parent not in self._modes:
            self._modes[path.parent] = path.parent.stat().st_mode
        files.replace(path, self.signer.seal(name, content), self._modes[path.parent])

    def read(self, name: str, max_bytes: int = files.MAX_SMALL_BYTES) -> bytes | None:
        """What a file holds; None if it is not there or, with a warning, not to be believed."""
        try:
            return self.signer.unseal(name, files.read_plain(self.root / name, max_bytes))
        except FileNotFoundError:
            return None
        except PayloadError as error:
            self.ignore(name, str(error))
            return None

    def counter(self, name: str) -> int | None:
        """A number that only grows; None if there is none.

        With a key, one below what this reader has seen is a replay, and none.
        """
        content = self.read(name, _MAX_COUNTER_BYTES)
        if content is None or not content.isdigit():
            return None
        counter = int(content)
        if self.signer.has_key:
            if counter < self._highest.get(name, 0):
                self.ignore(name, f"{counter} was there before what was seen last [replayed]")
                return None
            self._highest[name] = counter
        return counter

    def ignore(self, name: str, why: str) -> None:
        """Warn, once, that a name counts as not there."""
        if name not in self._ignored:
            self._ignored.add(name)
            logger.warning("%r is ignored: %s", str(self.root / name), why)
