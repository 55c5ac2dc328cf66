"""The storage link between the jobs: a directory on a shared file system.

A stream is the sequence of records that one job publishes; ``transport`` knows files and numbers,
not gradients. Layout below its root, with ``J`` the name of the publishing job::

    J/records/0000000012.safetensors   record 12 of J, created once, never replaced
    J/rejected/0000000012.safetensors  a record that a reader refused, kept aside, as the newest are
    J/rejected/0000000012.json         why
    J/kept/0000000012.safetensors      a second name of record 12, which pruning leaves alone
    J/acknowledged                     J's reader needs no record below this number again
    J/heartbeat                        a counter that moves while J lives
    J.weights/...                      a second stream of donor J: its own weights, for a teacher

Names are predictable: a receiver that waits for a donor looks up one name of its stream.

Symbolic links in the place of a stream's directories or files lead out of the run: they are as if
they were not there.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import json
import logging
import os
import re
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from toolkit.bridge import files
from toolkit.bridge.authentication import UNSIGNED, Signer
from toolkit.bridge.errors import BridgeError
from toolkit.bridge.payload import Header, check_identity, read_header
from toolkit.bridge.reasons import UNKNOWN, Rejection
from toolkit.bridge.signed_files import SignedFiles

logger = logging.getLogger(__name__)

READ_SECONDS = 5.0  # a network file system may show a new file to one host before another
_RECORD_NAME = re.compile(r"([0-9]{10})\.safetensors")

_NOTE_NAME = re.compile(r"([0-9]{10})\.json")


class DirectoryTransport:
    """Streams of records in a directory.

    Args:
        root: the run's bridge directory; must exist.
        signer: of the run, if its jobs have a key.
    """

    def __init__(self, root: Path, signer: Signer = UNSIGNED) -> None:
        self.root, self.signer = root, signer
        self.small = SignedFiles(root, signer)
        self._undeletable: set[Path] = set()  # directories that a warning was given for
        self._kept: set[str] = set()  # jobs whose directory of kept records is durable

    def open_stream(self, job: str) -> None:
        """Make the directories of ``job``'s own stream. Called once, by the job that publishes.

        What an earlier start of the job had not finished to write when it was killed is deleted.

        Raises:
            BridgeError: if the directory cannot be written, or has no hard links.
        """
        try:
            for name in (job, f"{job}/records", f"{job}/rejected"):
                files.make_directory(self.root / name)
            probe = self.root / job / f"probe-{uuid.uuid4().hex}"
            files.create(probe, lambda path: path.write_bytes(b""))
            probe.unlink()
            for name in self._names(job):
                if name.startswith(files.TEMPORARY_PREFIX):
                    self._delete(self.root / job / "records" / name)
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

    def aside_path(self, job: str, sequence: int) -> Path:
        """Where record ``sequence`` of ``job`` lies once a reader has refused it."""
        return self.root / job / "rejected" / f"{sequence:010d}.safetensors"

    def publish(self, job: str, sequence: int, write: Callable[[Path], object]) -> int:
        """Create record ``sequence`` with what ``write(path)`` writes; durable when it returns.

        Returns:
            The size of the record in bytes.

        Raises:
            FileExistsError: if that number is taken; what is there is left alone.
        """
        return files.create(self.path(job, sequence), write)

    def complete(self, job: str, sequence: int) -> int:
        """Make a record durable that was there when publishing it failed; its size in bytes."""
        path = self.path(job, sequence)
        files.fsync_path(path.parent)
        return path.stat().st_size

    def has(self, job: str, sequence: int) -> bool:
        """Whether there is something under the name of record ``sequence``; one look-up."""
        return os.path.lexists(self.path(job, sequence))

    def sequences(self, job: str) -> list[int]:
        """The numbers of the records that are there, ascending; a listing that pruning bounds."""
        return sorted(int(match[1]) for name in self._names(job) if (match := _match(name)))

    def alien_names(self, job: str) -> list[str]:
        """Names in ``job``'s record directory that are no record and no file being written."""
        return sorted(
            name
            for name in self._names(job)
            if not _match(name) and not name.startswith(files.TEMPORARY_PREFIX)
        )

    def read(self, job: str, sequence: int, *, max_bytes: int) -> memoryview:
        """The bytes of a record.

        Raises:
            FileNotFoundError: if it is not there (not yet, or pruned), or the disk fails just now.
            PayloadError: if it is no plain file, or is larger than ``max_bytes``.
        """
        with self._open(job, sequence) as file, _absent_if_failing(file.name):
            return files.read_whole(file, max_bytes)

    def read_head(self, job: str, sequence: int, num_bytes: int) -> bytes:
        """The first bytes of a record, at most ``num_bytes``; raises as :meth:`read` does."""
        with self._open(job, sequence) as file, _absent_if_failing(file.name):
            return file.read(num_bytes)

    def read_header(self, job: str, sequence: int) -> Header:
        """The header of a record, which belongs to this place; raises as :meth:`read` does."""
        header = read_header(functools.partial(self.read_head, job, sequence), self.signer)
        # That it is of this run too is what its signature says.
        check_identity(header, run_id=header.run_id, job=job, sequence=sequence)
        return header

    def acknowledge(self, job: str, sequence: int) -> None:
        """Tell ``job`` that its records below ``sequence`` will never be read again."""
        if self._is_inside(job):
            self.small.replace(f"{job}/acknowledged", str(sequence).encode())

    def acknowledged(self, job: str) -> int:
        """The number below which ``job``'s reader needs nothing any more; 0 at first."""
        return self.small.counter(f"{job}/acknowledged") or 0

    def prune(self, job: str, sequence: int) -> None:
        """Delete ``job``'s records below ``sequence``, but never its newest one.

        What cannot be deleted just now is left for the next time.
        """
        with contextlib.suppress(OSError):  # of the listing
            for old in self.sequences(job)[:-1]:
                if old < sequence:
                    self._delete(self.path(job, old))

    def prune_rejected(self, job: str, sequence: int, keep: int) -> None:
        """Delete what of ``job``'s records below ``sequence`` was refused, with the notes.

        What cannot be deleted just now is left for the next time.

        Args:
            job: the stream's.
            sequence: no reader asks for records below it again.
            keep: of those that were refused, the newest so many stay.
        """
        with contextlib.suppress(OSError):  # of the listing
            names = self._names(job, "rejected")
            found = {int(match[1]) for name in names if (match := _match(name) or _is_note(name))}
            for old in sorted(found)[:-keep]:
                if old < sequence:
                    self._delete(self.aside_path(job, old))
                    self._delete(self.root / _note(job, old))

    def keep(self, job: str, sequence: int) -> None:
        """Give a record a name that pruning leaves alone; durable when it returns. May be repeated.

        Raises:
            BridgeError: if the record is gone, or its directory leads out of the run.
            OSError: if the disk fails.
        """
        target = self.kept_path(job, sequence)
        try:
            if not target.parent.is_dir():
                files.make_directory(target.parent)
            if job not in self._kept:
                files.fsync_path(target.parent.parent)
                self._kept.add(job)
            if not self._is_inside(job, "kept"):
                raise NotADirectoryError(errno.ENOTDIR, "is outside of the run", str(target.parent))
            try:
                files.link(self.path(job, sequence), target)
            except FileExistsError:
                # Kept before a resume, or by a try that failed at its very end: the same bytes.
                files.fsync_path(target.parent)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise BridgeError(f"cannot keep payload {sequence} as {target}: {error}") from error

    def reject(self, job: str, sequence: int, reason: Rejection, detail: str) -> None:
        """Keep a record that must not be used aside, and leave a note for its publisher."""
        path, name = self.path(job, sequence), _note(job, sequence)
        note = json.dumps({"reason": reason, "detail": detail}).encode()
        if not (self._is_inside(job) and self._is_inside(job, "rejected")):
            return
        try:
            files.make_directory(self.root / job / "rejected")  # a stranger's stream may lack it
        except NotADirectoryError:
            self.small.ignore(f"{job}/rejected", "it is no directory")
            return
        try:
            self.small.create(name, note)
        except FileExistsError:
            if self.rejection(job, sequence) is None:  # it is no note of this run
                with contextlib.suppress(IsADirectoryError):
                    self.small.replace(name, note)
        with contextlib.suppress(OSError):  # what cannot be moved stays; its note says enough
            path.rename(self.aside_path(job, sequence))

    def rejection(self, job: str, sequence: int) -> str | None:
        """The reason for which record ``sequence`` was refused, or None."""
        note = self.small.read(_note(job, sequence))
        try:
            return None if note is None else str(json.loads(note)["reason"])
        except (ValueError, KeyError, TypeError, RecursionError):
            return UNKNOWN

    def beat(self, job: str, counter: int) -> None:
        """Set ``job``'s heartbeat counter. Not durable: it says something only while it moves."""
        self.small.replace(f"{job}/heartbeat", str(counter).encode())

    def heartbeat(self, job: str) -> str:
        """``job``'s heartbeat counter as text; empty before the first. Compare for change only.

        With a key it only grows for one reader. Who recorded all of a dead job's beats can still
        play them to a job that starts later: that job waits in vain, but not beyond its deadline.
        """
        try:
            counter = self.small.counter(f"{job}/heartbeat")
        except OSError:
            return ""
        return "" if counter is None else str(counter)

    def arrival_mark(self) -> int:
        """What changes when a job comes that was never here; one look-up. Compare for change only.

        A host may show its old value for a while: that nothing changes says nothing.
        """
        try:
            return os.lstat(self.root).st_mtime_ns
        except OSError:
            return 0

    def streams(self) -> list[str]:
        """The names of the streams that were opened here, at whatever time, in order."""
        names = (path.parent.name for path in self.root.glob("*/records") if path.is_dir())
        return sorted(name for name in names if self._is_inside(name))

    def rejected(self, job: str) -> list[int]:
        """The numbers of ``job``'s records that were refused, ascending."""
        names = self._names(job, "rejected")
        numbers = sorted(int(match[1]) for name in names if (match := _is_note(name)))
        return [number for number in numbers if self.rejection(job, number) is not None]

    def _open(self, job: str, sequence: int) -> io.BufferedReader:
        path = self.path(job, sequence)
        with _absent_if_failing(path):
            file = files.open_plain(path)
        # Looked at afterwards, so that who waits for a record only looks up its name.
        if not self._is_inside(job):
            file.close()
            raise FileNotFoundError(errno.ENOENT, "it is outside of the run", str(path))
        return file

    def _delete(self, path: Path) -> None:
        """Delete a file; something that is no file is not ours to delete.

        One that cannot be deleted stays, with one warning: the disk may fill up.
        """
        try:
            path.unlink()
        except (FileNotFoundError, IsADirectoryError):
            pass
        except OSError as error:
            if path.parent not in self._undeletable:
                self._undeletable.add(path.parent)
                logger.warning("files in %s cannot be deleted: %s", path.parent, error)

    def _is_inside(self, job: str, directory: str = "records") -> bool:
        """Whether a directory of a stream is there, and no link that leads out of the run."""
        for name in (job, f"{job}/{directory}"):
            if os.path.islink(os.path.join(self.root, name)):  # twice as fast as a Path's
                self.small.ignore(name, "it is a symbolic link")
                return False
        return True

    def _names(self, job: str, directory: str = "records") -> list[str]:
        if not self._is_inside(job, directory):
            return []
        try:
            return os.listdir(self.root / job / directory)
        except FileNotFoundError:
            return []


@contextlib.contextmanager
def _absent_if_failing(path: Path | str) -> Iterator[None]:
    """A disk that fails just now does not show what is there."""
    try:
        yield
    except OSError as error:
        raise FileNotFoundError(error.errno, error.strerror, str(path)) from None


def _note(job: str, sequence: int) -> str:
    return f"{job}/rejected/{sequence:010d}.json"


def _is_note(name: str) -> re.Match[str] | None:
    return _NOTE_NAME.fullmatch(name)


def _match(name: str) -> re.Match[str] | None:
    return _RECORD_NAME.fullmatch(name)
