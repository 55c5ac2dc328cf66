"""Other jobs' records, read by one rank or alike by all."""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from toolkit.bridge.config import BridgeConfig
from toolkit.bridge.control import ControlGroup
from toolkit.bridge.errors import DiskError, PayloadError
from toolkit.bridge.payload import Record
from toolkit.bridge.prefetch import Prefetch
from toolkit.bridge.transport import READ_SECONDS

logger = logging.getLogger(__name__)

_DISK_FAILS, _LACKS, _READ = 0.0, 1.0, 2.0  # what a rank has come to with a record, worst first


class Reading:
    """Reads records of the other jobs of a run.

    Args:
        read: reads and verifies one, by job and number.
        control: of this job's ranks.
        run_dir: of the run.
        config: the settings; the disk may fail for ``peer_wait`` seconds.
    """

    def __init__(
        self,
        read: Callable[[str, int], Record],
        control: ControlGroup,
        run_dir: Path,
        config: BridgeConfig,
    ) -> None:
        self._read, self._control = read, control
        self._run_dir, self._config = run_dir, config
        self._prefetch: Prefetch | None = None

    def read_ahead(self, find: Callable[[], Iterable[tuple[str, int]]]) -> None:
        """From now on, on this rank: read what ``find`` names before it is asked for."""
        if self._prefetch is None:
            self._prefetch = Prefetch(find, self._read)

    def stop(self) -> None:
        """Read no more ahead."""
        if self._prefetch is not None:
            self._prefetch.stop()

    def read(self, job: str, sequence: int) -> Record:
        """Read and verify one record of another job, on this rank."""
        read = self._read if self._prefetch is None else self._prefetch.read
        return read(job, sequence)

    def read_everywhere(
        self, job: str, sequence: int, digest: str, mine: Record | None
    ) -> Record | None:
        """The same record on every rank, or None on every rank if one of them lacks it.

        Args:
            job: whose record it is.
            sequence: the record's number.
            digest: the tensors' digest that the main process read; every rank must find it.
            mine: the record, where this rank has read it already.

        Raises:
            DiskError: on every rank, if the disk of one fails for ``peer_wait`` seconds.
        """
        record, disk_fails, start = mine, False, time.monotonic()
        while record is None:
            try:
                record = self.read(job, sequence)
            except (OSError, PayloadError) as error:
                disk_fails = isinstance(error, OSError) and error.errno != errno.ENOENT
                patience = self._config.peer_wait if disk_fails else READ_SECONDS
                if time.monotonic() > start + patience:
                    logger.warning("rank cannot read record %d: %s", sequence, error)
                    break
                time.sleep(0.05)
        if record is None:
            mine_is = _DISK_FAILS if disk_fails else _LACKS
        else:
            mine_is = _READ if record.header.tensors_digest == digest else _LACKS
        outcome = self._control.min(mine_is)
        if outcome == _DISK_FAILS:
            raise DiskError(
                f"the disk of some rank has failed for {self._config.peer_wait:g} s (--peer_wait), "
                f"as that rank's log says: let its host read {self._run_dir} again, then start "
                "this job again, with --resume_from_checkpoint if it has a checkpoint"
            )
        return record if outcome == _READ else None
