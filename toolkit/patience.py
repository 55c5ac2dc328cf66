"""Writing what a job leaves behind to a disk that may fail for a while."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from toolkit.bridge.errors import BridgeError

logger = logging.getLogger(__name__)

PATIENCE_SECONDS, RETRY_SECONDS = 60.0, 1.0  # with a disk that fails
# What torch.save says, by a RuntimeError, where the disk refuses.
_TORCH_SAVE = ("inline_container", "PytorchStreamWriter", "iostream")


def write_patiently(
    what: str,
    path: Path,
    write: Callable[[], object],
    on_any_rank: Callable[[bool], bool] = bool,
    *,
    is_repeatable: bool = True,
) -> None:
    """Write, and again for a minute where the disk refuses it.

    Args:
        what: in words, for the message.
        path: likewise.
        write: may be repeated after a failure.
        on_any_rank: of whether this rank has failed, whether one has; a collective, where all ranks
            write.
        is_repeatable: False to try once.

    Raises:
        BridgeError: on all ranks, saying what to do.
    """
    start, num_tries = time.monotonic(), 0
    while True:
        failure: Exception | None = None
        try:
            write()
        except (OSError, SafetensorError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not any(m in str(error) for m in _TORCH_SAVE):
                raise
            failure = error
        num_tries += 1
        if not on_any_rank(failure is not None):
            if num_tries > 1:
                logger.warning("the disk took %s %s at try %d", what, path, num_tries)
            return
        reason = failure or "the disk of another rank refuses it"
        # Tries, not seconds: all ranks count the same.
        if not is_repeatable or num_tries > PATIENCE_SECONDS / RETRY_SECONDS:
            raise BridgeError(
                f"cannot write {what} {path}: {reason}. Free some space there, or let this user "
                "write there again, and go on from the newest checkpoint "
                "(--resume_from_checkpoint latest)"
            ) from failure
        if num_tries % 5 == 1:
            logger.warning(
                "DISK FAILS since %.0f s, trying again for about %g s: cannot write %s %s: %s",
                time.monotonic() - start, PATIENCE_SECONDS, what, path, reason,
            )  # fmt: skip
        time.sleep(RETRY_SECONDS)
