"""The storage link between the jobs: a directory on a shared file system.

A stream is the sequence of records that one job publishes; ``transport`` knows files and numbers,
not gradients. Layout below its root, with ``J`` the name of the publishing job::

    J/records/0000000012.safetensors   record 12 of J, created once, never replaced
    J/rejected/0000000012.safetensors  a record that a reader refused, kept aside
    J/rejected/0000000012.json         why
    J/kept/0000000012.safetensors      a second name of record 12, which pruning leaves alone
    J/acknowledged                     J's reader needs no record below this number again
    J/heartbeat                        a counter that moves while J lives
    J.weights/...                      a second stream of donor J: its own weights, for a teacher

Names are predictable: a receiver that waits for a donor looks up one name of its stream.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import stat
import uuid
from collections.abc import Callable
from pathlib import Path

from toolkit.bridge import files
from toolkit.bridge.errors import BridgeError, PayloadError

READ_SECONDS = 5.0  # a network file system may show a new file to one host before another
_RECORD_NAME = re.compile(r"([0-9]{10})\.safetensors")
_NO_PLAIN_FILE = (
    errno.ELOOP,
    errno.ENXIO,
    errno.ENOTDIR,
)  # a link, a socket, a path through a file


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
            probe = self.root / job / f"probe-{uuid.uuid4().hex}"
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

    def kept_path(self, job: str, sequence: int) -> Path:
        """Where record ``sequence`` of ``job`` lies once it is kept for good."""
        return self.root / job / "kept" / f"{sequence:010d}.safetensors"

    def publish(self, job: str, sequence: int, write: Callable[[Path], object]) -> int:
        """Create record ``sequence`` with what ``write(path)`` writes; durable when it returns.

        Returns:
            The size of the record in bytes.

        Raises:
            FileExistsError: if that number is taken; what is there is left alone.
        """
        return files.create(self.path(job, sequence), write)

    def sequences(self, job: str) -> list[int]:
        """The numbers of the records that are there, ascending; a listing that pruning bounds."""
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
            FileNotFoundError: if it is not there (not yet, or pruned), or the disk fails just now.
            PayloadError: if it is no plain file, or is larger than ``max_bytes``.
        """
        with self._open(job, sequence) as file:
            size = os.fstat(file.fileno()).st_size
            if size > max_bytes:
                raise PayloadError("too_large", f"{size} bytes, at most {max_bytes} are expected")
            return _read(file, max_bytes)

    def read_head(self, job: str, sequence: int, num_bytes: int) -> bytes:
        """The first bytes of a record, at most ``num_bytes``; raises as :meth:`read` does."""
        with self._open(job, sequence) as file:
            return _read(file, num_bytes)

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
                # Something that is no file is not ours to delete.
                with contextlib.suppress(FileNotFoundError, IsADirectoryError, PermissionError):
                    self.path(job, old).unlink()

    def keep(self, job: str, sequence: int) -> None:
        """Give a record a name that pruning leaves alone; durable when it returns. May be repeated.

        Raises:
            BridgeError: if the record is gone, or the disk refuses.
        """
        target = self.kept_path(job, sequence)
        try:
            if not target.parent.is_dir():
                target.parent.mkdir(exist_ok=True)
                files.fsync_path(target.parent.parent)
            with contextlib.suppress(FileExistsError):  # kept before a resume: the same bytes
                files.link(self.path(job, sequence), target)
        except OSError as error:
            raise BridgeError(f"cannot keep payload {sequence} as {target}: {error}") from error

    def reject(self, job: str, sequence: int, reason: str, detail: str) -> None:
        """Keep a record that must not be used aside, and leave a note for its publisher."""
        path = self.path(job, sequence)
        note = json.dumps({"reason": reason, "detail": detail}).encode()
        with contextlib.suppress(FileExistsError):
            files.create(self._note(job, sequence), lambda temporary: temporary.write_bytes(note))
        with contextlib.suppress(FileNotFoundError):
            path.rename(self.root / job / "rejected" / path.name)

    def rejection(self, job: str, sequence: int) -> str | None:
        """The reason for which record ``sequence`` was refused, or None."""
        try:
            return str(json.loads(self._note(job, sequence).read_bytes())["reason"])
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):
            return "unknown"

    def beat(self, job: str, counter: int) -> None:
        """Set ``job``'s heartbeat counter. Not durable: it says something only while it moves."""
        files.replace(self.root / job / "heartbeat", str(counter).encode())

    def heartbeat(self, job: str) -> str:
        """``job``'s heartbeat counter as text; empty before the first. Compare for change only."""
        try:
            return (self.root / job / "heartbeat").read_text()
        except OSError:
            return ""

    def streams(self) -> list[str]:
        """The names of the streams that were opened here, at whatever time, in order."""
        return sorted(path.parent.name for path in self.root.glob("*/records"))

    def rejected(self, job: str) -> list[int]:
        """The numbers of ``job``'s records that were refused, ascending."""
        notes = (self.root / job / "rejected").glob("[0-9]*.json")
        return sorted(int(note.stem) for note in notes)

    def _open(self, job: str, sequence: int) -> io.BufferedReader:
        path = self.path(job, sequence)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError as error:
            if error.errno in _NO_PLAIN_FILE:
                raise PayloadError("not_a_file", f"{path.name}: {error.strerror}") from None
            raise FileNotFoundError(error.errno, error.strerror, str(path)) from None
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise PayloadError("not_a_file", f"{path.name} is no plain file")
        return os.fdopen(descriptor, "rb")

    def _note(self, job: str, sequence: int) -> Path:
        return self.root / job / "rejected" / f"{sequence:010d}.json"

    def _names(self, job: str) -> list[str]:
        try:
            return os.listdir(self.root / job / "records")
        except FileNotFoundError:
            return []


def _read(file: io.BufferedReader, num_bytes: int) -> bytes:
    try:
        return file.read(num_bytes)
    except OSError as error:
        raise FileNotFoundError(error.errno, error.strerror, file.name) from None


def _match(name: str) -> re.Match[str] | None:
    return _RECORD_NAME.fullmatch(name)
