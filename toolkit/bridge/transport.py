"""The storage link between the jobs: a directory on a shared file system.

A stream is the sequence of records that one job publishes; ``transport`` knows files and numbers,
not gradients. Layout below its root, with ``J`` the publishing job::

    J/records/0000000012.safetensors   record 12 of J, created once, never replaced
    J/rejected/0000000012.safetensors  a record that a reader refused, kept aside
    J/rejected/0000000012.json         why
    J/acknowledged                     J's reader needs no record below this number again
    J/heartbeat                        a counter that moves while J lives

Names are predictable, so that waiting costs one look-up of one name and not a listing.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path

from toolkit.bridge import files
from toolkit.bridge.errors import BridgeError, PayloadError

_RECORD_NAME = re.compile(r"(\d{10})\.safetensors")


class DirectoryTransport:
    """Streams of records in a directory.

    Args:
        root: the run's bridge directory; must exist.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def open_stream(self, job: str) -> None:
        """Make the directories of ``job``'s own stream. Called once, by the job that publishes.

        Raises:
            BridgeError: if the directory cannot be written, or has no hard links.
        """
        try:
            for name in ("records", "rejected"):
                (self.root / job / name).mkdir(parents=True, exist_ok=True)
            probe = self.root / job / f"probe-{os.getpid()}"
            files.create(probe, lambda path: path.write_bytes(b""))
            probe.unlink()
        except OSError as error:
            raise BridgeError(
                f"cannot publish below {self.root / job}: {error}. The runs directory must be on a "
                "file system that both jobs can write to and that has hard links"
            ) from error

    def path(self, job: str, sequence: int) -> Path:
        """Where record ``sequence`` of ``job`` lies."""
        return self.root / job / "records" / f"{sequence:010d}.safetensors"

    def publish(self, job: str, sequence: int, write: Callable[[Path], object]) -> int:
        """Create record ``sequence`` with what ``write(path)`` writes; durable when it returns.

        Returns:
            The size of the record in bytes.

        Raises:
            FileExistsError: if that number is taken; what is there is left alone.
        """
        path = self.path(job, sequence)
        files.create(path, write)
        return path.stat().st_size

    def exists(self, job: str, sequence: int) -> bool:
        """Whether record ``sequence`` is there: one look-up, cheap at any number of files."""
        return self.path(job, sequence).exists()

    def sequences(self, job: str) -> list[int]:
        """The numbers of the records that are there, ascending. A listing: not for polling."""
        return sorted(int(match[1]) for name in self._names(job) if (match := _match(name)))

    def alien_names(self, job: str) -> list[str]:
        """Names in ``job``'s record directory that are no record and no file being written."""
        return sorted(
            name
            for name in self._names(job)
            if not _match(name) and not name.startswith((".tmp", files.TEMPORARY_PREFIX))
        )

    def read(self, job: str, sequence: int, *, max_bytes: int) -> bytes:
        """The bytes of a record.

        Raises:
            FileNotFoundError: if it is not there (not yet, or pruned).
            PayloadError: if it is no plain file, is larger than ``max_bytes``, or cannot be read.
        """
        path = self.path(job, sequence)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise PayloadError("not_a_file", f"cannot open {path.name}: {error.strerror}") from None
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise PayloadError("not_a_file", f"{path.name} is no plain file")
            if status.st_size > max_bytes:
                raise PayloadError(
                    "too_large", f"{status.st_size} bytes, at most {max_bytes} are expected"
                )
            try:
                return file.read(max_bytes)
            except OSError as error:
                raise PayloadError("unreadable", f"cannot read {path.name}: {error}") from None

    def acknowledge(self, job: str, sequence: int) -> None:
        """Tell ``job`` that its records below ``sequence`` will never be read again."""
        files.replace(self.root / job / "acknowledged", str(sequence).encode())

    def acknowledged(self, job: str) -> int:
        """The number below which ``job``'s reader needs nothing any more; 0 at first."""
        try:
            return int((self.root / job / "acknowledged").read_bytes())
        except (FileNotFoundError, ValueError):
            return 0

    def prune(self, job: str, sequence: int) -> None:
        """Delete ``job``'s records below ``sequence``, but never its newest one."""
        for old in self.sequences(job)[:-1]:
            if old < sequence:
                with contextlib.suppress(FileNotFoundError):
                    self.path(job, old).unlink()

    def reject(self, job: str, sequence: int, reason: str, detail: str) -> None:
        """Keep a record that must not be used aside, and leave a note for its publisher."""
        aside = self.root / job / "rejected"
        path = self.path(job, sequence)
        with contextlib.suppress(FileNotFoundError):
            path.rename(aside / path.name)
        note = json.dumps({"reason": reason, "detail": detail}).encode()
        with contextlib.suppress(FileExistsError):
            files.create(self._note(job, sequence), lambda temporary: temporary.write_bytes(note))

    def rejection(self, job: str, sequence: int) -> str | None:
        """The reason for which record ``sequence`` was refused, or None."""
        try:
            return str(json.loads(self._note(job, sequence).read_bytes())["reason"])
        except FileNotFoundError:
            return None

    def beat(self, job: str, counter: int) -> None:
        """Set ``job``'s heartbeat counter. Not durable: it says something only while it moves."""
        files.replace(self.root / job / "heartbeat", str(counter).encode())

    def heartbeat(self, job: str) -> str:
        """``job``'s heartbeat counter as text; empty before the first. Compare for change only."""
        try:
            return (self.root / job / "heartbeat").read_text()
        except OSError:
            return ""

    def _note(self, job: str, sequence: int) -> Path:
        return self.root / job / "rejected" / f"{sequence:010d}.json"

    def _names(self, job: str) -> list[str]:
        try:
            return os.listdir(self.root / job / "records")
        except FileNotFoundError:
            return []


def _match(name: str) -> re.Match[str] | None:
    return _RECORD_NAME.fullmatch(name)
