"""Every record of a run, read in full and held against its digests and the ledger."""

from __future__ import annotations

import dataclasses
import errno
from collections.abc import Callable, Iterator
from pathlib import Path

from toolkit.bridge import files
from toolkit.bridge.errors import PayloadError
from toolkit.bridge.payload import check_identity, parse_record
from toolkit.inspection.report import BadRecord, Run, Verified
from toolkit.inspection.run import Look


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """Where a record lies."""

    stream: str
    sequence: int
    path: Path


class Verification:
    """The records of one run, to be read one after another.

    Args:
        look: that found the run.
        run: what it found.

    Attributes:
        places: of the records, and of the kept ones that are no second names of these.
    """

    def __init__(self, look: Look, run: Run) -> None:
        self._look, self._run = look, run
        applied = [entry for entry in look.path if entry.fate == "applied"]
        self._applied = {(entry.donor, entry.sequence): entry.digest for entry in applied}
        self.places = [place for stream in run.streams for place in self._places(stream.name)]

    def read(self, advance: Callable[[], object]) -> Run:
        """Read all of them.

        Args:
            advance: is called after each.

        Returns:
            The run, with what was found added to it.
        """
        num_records = num_bytes = 0
        bad: list[BadRecord] = []
        for place in self.places:
            name = str(place.path.relative_to(self._look.run_dir))
            try:
                num_bytes += self._check(place)
            except PayloadError as error:
                bad.append(BadRecord(path=name, reason=error.reason, detail=error.detail))
            except MemoryError:
                bad.append(BadRecord(path=name, reason="too_large", detail="no memory for it"))
            except OSError as error:
                num_records -= error.errno == errno.ENOENT  # deleted meanwhile
                if error.errno != errno.ENOENT:
                    detail = str(error.strerror)
                    bad.append(BadRecord(path=name, reason="unreadable", detail=detail))
            num_records += 1
            advance()
        return dataclasses.replace(
            self._run,
            verified=Verified(num_records=num_records, num_bytes=num_bytes, bad=bad),
            problems=[
                *self._run.problems,
                *(f"{record.path}: {record.detail} [{record.reason}]" for record in bad),
            ],
        )

    def _check(self, place: Place) -> int:
        """Read one record and compare; its size in bytes.

        Raises:
            OSError: if it is not there, or cannot be read.
            PayloadError: if it is not what it should be.
        """
        stream, sequence, transport = place.stream, place.sequence, self._look.transport
        if place.path == transport.path(stream, sequence):
            size = self._look.record_bytes or place.path.lstat().st_size
            data: bytes | memoryview = transport.read(stream, sequence, max_bytes=size)
        else:
            data = files.read_plain(place.path, place.path.lstat().st_size)
        record = parse_record(data, transport.signer)
        if self._run.run_id is not None:
            check_identity(record.header, run_id=self._run.run_id, job=stream, sequence=sequence)
        digest = record.header.tensors_digest
        if self._applied.get((stream, sequence), digest) != digest:
            raise PayloadError("digest", "the ledger says that another payload was applied")
        return record.num_bytes

    def _places(self, stream: str) -> Iterator[Place]:
        transport = self._look.transport
        for sequence in transport.sequences(stream):
            yield Place(stream, sequence, transport.path(stream, sequence))
        for path in self._look.kept(stream):
            first = transport.path(stream, int(path.stem))
            try:
                is_second_name = path.samefile(first)
            except OSError:
                is_second_name = False
            if not is_second_name:
                yield Place(stream, int(path.stem), path)
