"""What the bridge raises, so that a caller can tell a wrong setting from a wrong file."""

from __future__ import annotations

from toolkit.bridge.reasons import Rejection


class BridgeError(RuntimeError):
    """The bridge cannot go on: a wrong setting, a taken run, a partner that never came."""


class ClassMismatchError(BridgeError):
    """The jobs number the classes of a head in different ways."""


class SchemaMismatchError(BridgeError):
    """The two jobs do not share the same parameters; the message lists the tensors that differ."""


class OtherKeyError(BridgeError):
    """A run's jobs have another key than this job, or only one of both has a key."""


class PeerError(BridgeError):
    """The other job did not come, or went silent, and ``require_peer`` is set."""


class DiskError(BridgeError):
    """The disk has failed for longer than this job waits; the message says what to do."""


class Interrupted(BridgeError):
    """Ctrl-C or SIGTERM came while this job waited for the other one.

    Args:
        signal: its number.
    """

    def __init__(self, signal: int) -> None:
        super().__init__(f"interrupted by signal {signal} while waiting for the other job")
        self.signal = signal

    def __reduce__(self) -> tuple[type[Interrupted], tuple[int]]:
        return type(self), (self.signal,)


_MAX_DETAIL = 500  # characters, of a sentence that may quote a stranger's file


class PayloadError(Exception):
    """A file that must not reach a gradient.

    Args:
        reason: a short code; ``gradient-bridge reasons`` says what each means.
        detail: a sentence with the offending value; cut short where that fills the log.
    """

    def __init__(self, reason: Rejection, detail: str) -> None:
        if len(detail) > _MAX_DETAIL:
            detail = f"{detail[:_MAX_DETAIL]} ..."
        super().__init__(f"{detail} [{reason}]")
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type[PayloadError], tuple[Rejection, str]]:
        return type(self), (self.reason, self.detail)
