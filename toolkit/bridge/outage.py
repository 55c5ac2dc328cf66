"""A disk that fails for a while: tried again, with a status line, and for a stated time.

A full disk, a quota, a server that restarts, a remount: most of it passes, and what a training job
has in its memory is worth more than the wait. What is tried again must bear repetition.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from toolkit.bridge.errors import DiskError

logger = logging.getLogger(__name__)

T = TypeVar("T")

STATUS_SECONDS, RETRY_SECONDS = 5.0, 0.05
_REMEDIES = {
    errno.ENOSPC: "free some space on its file system",
    errno.EDQUOT: "delete something of yours there, or have your quota raised",
    errno.EROFS: "mount its file system for writing again",
    errno.EACCES: "let this user write there again",
    errno.EPERM: "let this user write there again",
    errno.ENOENT: "put back what was deleted or unmounted there",
}
_OTHER_REMEDY = "see what 'gradient-bridge doctor' says of it"


def riding_out(
    poll: Callable[[], T | None], directory: Path, patience_seconds: float
) -> Callable[[], T | None]:
    """The same poll, which has nothing to say yet while the disk fails.

    Args:
        poll: looks or writes, and may be called again after an ``OSError``.
        directory: what to name in messages.
        patience_seconds: how long the disk may fail without a break.

    Returns:
        A poll that raises ``DiskError`` once the disk has failed for so long.
    """
    since: float | None = None
    next_status = 0.0

    def riding() -> T | None:
        nonlocal since, next_status
        try:
            outcome = poll()
        except OSError as error:
            now = time.monotonic()
            remedy = _REMEDIES.get(error.errno or 0, _OTHER_REMEDY)
            if since is None:
                since = next_status = now
            if now - since >= patience_seconds:
                raise DiskError(
                    f"the disk has failed for {patience_seconds:g} s (--peer_wait): {error}. This "
                    f"job cannot go on without {directory}: {remedy}, then start it again, with "
                    "--resume_from_checkpoint if it has a checkpoint"
                ) from error
            if now >= next_status:
                next_status = now + STATUS_SECONDS
                logger.warning(
                    "DISK FAILS since %.0f of at most %g s, trying again: %s. In %s: %s",
                    now - since, patience_seconds, error, directory, remedy,
                )  # fmt: skip
            return None
        if since is not None:
            logger.warning("the disk works again after %.1f s", time.monotonic() - since)
            since = None
        return outcome

    return riding


def ride_out(action: Callable[[], T], directory: Path, patience_seconds: float) -> T:
    """What ``action`` returns once the disk lets it; arguments as of :func:`riding_out`.

    Raises:
        DiskError: if the disk fails for so long.
    """
    poll = riding_out(lambda: (action(),), directory, patience_seconds)
    while (outcome := poll()) is None:
        time.sleep(RETRY_SECONDS)
    return outcome[0]
