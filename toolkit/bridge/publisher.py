"""What one job publishes in one stream: records with numbers that follow one another."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from toolkit.bridge.digests import Digest
from toolkit.bridge.errors import BridgeError, PayloadError
from toolkit.bridge.payload import (
    Header,
    check_identity,
    parse_header,
    write_record,
)
from toolkit.bridge.transport import DirectoryTransport

logger = logging.getLogger(__name__)

_REFUSED_KEPT = 100  # of the records that a reader has put aside, and looks at them so often
_WEIGHTS_KEPT = 2  # the newest, and the ones that another job may be reading


class Publisher:
    """Numbers and publishes records; on the main process.

    Args:
        transport: the run's transport.
        stream: the name of the stream; its directories are made here.
        run_id: of the run.
        record_bytes: the size of a record, at most.

    Attributes:
        next_sequence: the number of the next record.
        num_records: published by this object.
        num_bytes: their size on disk.

    Raises:
        BridgeError: if the stream's directories cannot be made.
    """

    def __init__(
        self, transport: DirectoryTransport, stream: str, run_id: str, record_bytes: int
    ) -> None:
        self._transport, self.stream = transport, stream
        self._run_id, self._record_bytes = run_id, record_bytes
        transport.open_stream(stream)
        self._newest = self._find_newest()
        # The newest of all may lie aside, and what was before it be deleted, with its note.
        refused = transport.rejected(stream)
        self.next_sequence = max([self._newest, *refused]) + 1
        self._next_clearing = 0
        self.num_records = self.num_bytes = 0
        self._tried: Header | None = None  # of the record whose publishing failed last

    def publish(
        self, header: Header, tensors: Mapping[str, Tensor], digest: Digest | None = None
    ) -> int:
        """Publish the next record; its size in bytes.

        A number that an alien file occupies, or that the reader has refused already, is passed
        over. After an ``OSError`` it may be repeated with the same record, which is there once, or
        go on with another one, which then comes after the one that failed, if that is there.

        Args:
            header: of the record, whose stream and number are filled in.
            tensors: by name.
            digest: of them, where it has been begun already.

        Raises:
            BridgeError: if another living process publishes in this stream.
            OSError: if the disk fails.
        """
        digest = digest or Digest(tensors)
        while True:
            sequence = self.next_sequence
            if self._transport.rejection(self.stream, sequence) is not None:
                self.next_sequence += 1
                continue
            numbered = dataclasses.replace(header, job=self.stream, sequence=sequence)

            def write(path: Path, header: Header = numbered) -> None:
                write_record(path, header, tensors, self._transport.signer, digest)

            try:
                size = self._transport.publish(self.stream, sequence, write)
                is_this_one = True
            except FileExistsError:
                if not self._has_left(sequence):
                    self._refuse_rival(sequence)
                    self.next_sequence += 1
                    continue
                size = self._transport.complete(self.stream, sequence)
                is_this_one = self._tried == numbered.with_digest(digest.result())
            except OSError:
                self._tried = numbered.with_digest(digest.result())
                raise
            self._newest = sequence
            self.next_sequence += 1
            self.num_records += 1
            self.num_bytes += size
            if is_this_one:
                return size

    def publish_weights(
        self, header: Header, tensors: Mapping[str, Tensor], digest: Digest | None = None
    ) -> None:
        """Publish the newest state of some weights, as :meth:`publish` does, and delete old ones.

        Files in the place of older ones go too.
        """
        self.publish(header, tensors, digest)
        self.prune(self.next_sequence - _WEIGHTS_KEPT)

    def prune(self, sequence: int) -> None:
        """Delete the records below ``sequence`` but the newest, and of those refused all but some.

        The newest one's number is what a restarted job continues after, whatever an alien file is
        called.
        """
        self._transport.prune(self.stream, min(sequence, self._newest))
        if self.next_sequence >= self._next_clearing:
            self._next_clearing = self.next_sequence + _REFUSED_KEPT
            self._transport.prune_rejected(self.stream, sequence, keep=_REFUSED_KEPT)

    @property
    def last_rejection(self) -> str | None:
        """The reason for which a reader refused the newest record, or None."""
        return self._transport.rejection(self.stream, self.next_sequence - 1)

    def _find_newest(self) -> int:
        """The number of this stream's newest record; -1 if there is none.

        An alien file with a high number must not lead to numbers that no reader comes to.
        """
        for sequence in reversed(self._transport.sequences(self.stream)):
            try:
                header = self._transport.read_header(self.stream, sequence)
            except PayloadError:
                continue
            except FileNotFoundError:  # moved aside just now, or the disk fails: it may be ours
                return sequence
            if header.run_id == self._run_id:
                return sequence
        return -1

    def _has_left(self, sequence: int) -> bool:
        """Whether a record is what a try that failed at its very end has left."""
        if self._tried is None or self._tried.sequence != sequence:
            return False
        try:
            return self._transport.read_header(self.stream, sequence) == self._tried
        except PayloadError:
            return False

    def _refuse_rival(self, sequence: int) -> None:
        path = self._transport.path(self.stream, sequence)
        try:
            data = self._transport.read(self.stream, sequence, max_bytes=self._record_bytes)
            header = parse_header(data, self._transport.signer)
            check_identity(header, run_id=self._run_id, job=self.stream, sequence=sequence)
        except (FileNotFoundError, PayloadError):
            logger.warning("%s is taken by an alien file; publishing under the next number", path)
            return
        raise BridgeError(
            f"{path} exists already: another process publishes as the {self.stream} of this run. "
            "End one of the two, or start a new run"
        )
