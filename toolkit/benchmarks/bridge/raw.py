"""The floor: moving the same bytes by hand, from a buffer on one side to a buffer on the other.

As durable and as certain as a record of the bridge: a digest over all bytes, a file that appears
whole under a name that never existed, synced with its directory; read into memory that is there
already, the digest compared. One thing after the other, on one thread.
"""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

DIGEST_BYTES = hashlib.sha256().digest_size
POLL_SECONDS = 0.0002


class RawHandOver:
    """One side of a raw hand-over of files of one size.

    Args:
        directory: for the files; must exist, on the disk that is measured.
        num_bytes: of each, without the digest.
    """

    def __init__(self, directory: Path, num_bytes: int) -> None:
        self._directory, self._descriptor = directory, os.open(directory, os.O_RDONLY)
        self._out = memoryview(bytearray(os.urandom(num_bytes)))
        self._in = memoryview(bytearray(num_bytes + DIGEST_BYTES))
        self._in[:] = bytes(len(self._in))  # so that its pages are there

    def write(self, name: str) -> None:
        """Digest the buffer and write it; durable when it returns."""
        digest = hashlib.sha256(self._out).digest()
        path, temporary = self._directory / name, self._directory / f".{name}"
        with temporary.open("xb", buffering=0) as file:
            rest = self._out
            while rest:
                rest = rest[file.write(rest) :]
            file.write(digest)
            os.fsync(file.fileno())
        os.link(temporary, path)
        temporary.unlink()
        os.fsync(self._descriptor)

    def read(self, name: str) -> None:
        """Wait for a file, read it, compare its digest, and delete it.

        Raises:
            ValueError: for other bytes.
        """
        path = self._directory / name
        while not os.path.exists(path):
            time.sleep(POLL_SECONDS)
        with path.open("rb", buffering=0) as file:
            rest = self._in
            while rest and (num_read := file.readinto(rest)):
                rest = rest[num_read:]
        if hashlib.sha256(self._in[:-DIGEST_BYTES]).digest() != self._in[-DIGEST_BYTES:]:
            raise ValueError(f"{path} was torn")
        path.unlink()
