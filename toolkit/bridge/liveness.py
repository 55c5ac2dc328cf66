"""Whether the other job lives, judged without comparing clocks.

A job moves a counter while it lives; the other job watches the counter change against its own
monotonic clock. Clocks of two hosts are never compared, and a stepped clock changes nothing.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

from toolkit.bridge.errors import PeerError
from toolkit.bridge.transport import DirectoryTransport

logger = logging.getLogger(__name__)

BEAT_SECONDS = 1.0
RESTING_BEATS = 2  # so many of them between two of a job whose peers have long been silent
SILENT_BEATS = 5  # without which a job does not live, where nothing says to wait for longer
STATUS_SECONDS = 5.0
# A peer whose heart beats but that brings nothing (a long evaluation, a hung rank) gets this many
# times the wait of a silent one, or this many of the longest round seen.
STALL_FACTOR = 10
# Of the time between two looks for the other job no more counts as silence. A job that stood still
# itself, or its disk did, cannot say who was silent meanwhile.
BLIND_SECONDS = 2 * BEAT_SECONDS


class Heartbeat:
    """Moves a job's counter from a thread of its own, so that a long step is no silence.

    Attributes:
        rests: whether it beats more slowly, which may be set at any time.
        fails: whether the disk has refused its newest beat. It may have refused the peers' too.
    """

    def __init__(self, transport: DirectoryTransport, job: str, attempt: int = 0) -> None:
        self._transport, self._job = transport, job
        self._stop = threading.Event()
        self.rests = self.fails = False
        # With a key a smaller value is no life: a restart goes on above those of earlier ones,
        # even where the last one cannot be read.
        self._counter = max(int(transport.heartbeat(job) or 0), attempt << 32)
        self._thread = threading.Thread(target=self._run, name=f"{job}-heartbeat", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            self._counter += 1
            # A disk that fails for a while is silence, which the peer's deadline covers.
            try:
                self._transport.beat(self._job, self._counter)
                self.fails = False
            except OSError:
                self.fails = True
            if self._stop.wait(BEAT_SECONDS * (RESTING_BEATS if self.rests else 1)):
                return

    def stop(self) -> None:
        """End the thread; the counter stands still from here on."""
        self._stop.set()
        self._thread.join()


class PeerWatch:
    """Observes one other job.

    Attributes:
        seen: whether it was observed to live since this watch began.
        num_signs: how often.
        longest_round: the longest time, in seconds, that it has taken to answer so far.
    """

    def __init__(
        self,
        transport: DirectoryTransport,
        job: str,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self._transport, self.job = transport, job
        self._clock = clock or time.monotonic
        self._counter = transport.heartbeat(job)
        self._last_sign = self._clock()
        self.seen = False
        self.num_signs = 0
        self.longest_round = 0.0

    def observe(self) -> bool:
        """Look at the counter once; whether it moved, which is a sign of life, as no value is."""
        counter = self._transport.heartbeat(self.job)
        if not counter or counter == self._counter:  # empty: it cannot be read just now
            return False
        self._counter = counter
        self.sign_of_life()
        return True

    def glance(self) -> bool:
        """Look up one name; whether there is a reason to look closer."""
        return self.observe()

    def sign_of_life(self) -> None:
        """Note that the job did something that only a living job does."""
        self._last_sign, self.seen = self._clock(), True
        self.num_signs += 1

    @property
    def silent_seconds(self) -> float:
        """Seconds since the last sign of life, or since the watch began."""
        return self._clock() - self._last_sign

    def is_alive(self, patience_seconds: float) -> bool:
        """Whether it showed life within the last ``patience_seconds``."""
        return self.seen and self.silent_seconds < patience_seconds

    def await_life(self, timeout_seconds: float) -> bool:
        """Watch until the counter moves; False if it does not within ``timeout_seconds``."""
        deadline = self._clock() + timeout_seconds
        while not self.seen and self._clock() < deadline:
            time.sleep(0.05)
            self.observe()
        return self.seen


class ArrivalWatch(PeerWatch):
    """Observes one other job that may not be there yet, and may come under another name."""

    def __init__(self, transport: DirectoryTransport, job: str) -> None:
        super().__init__(transport, job)
        self._mark = transport.arrival_mark()

    def glance(self) -> bool:
        """Look up one name; whether there is a reason to look closer: somebody has come."""
        if self.seen:
            return self.observe()
        before, self._mark = self._mark, self._transport.arrival_mark()
        return self._mark != before


def some_heart_beats(bridge: Path, timeout_seconds: float) -> bool:
    """Whether some job in a run's bridge directory moves its counter, whatever it says."""

    def look() -> dict[Path, int]:
        return {path: path.lstat().st_mtime_ns for path in bridge.glob("*/heartbeat")}

    before, deadline = look(), time.monotonic() + timeout_seconds
    while time.monotonic() < deadline:
        if look() != before:
            return True
        time.sleep(0.05)
    return False


class Wait:
    """One bounded wait for the other job, with a status line while it lasts.

    Args:
        peer: the job waited for; its longest round is kept up to date.
        what: what is waited for, for the status line.
        peer_wait: seconds of silence after which the wait is given up.
        require_peer: raise instead of giving up.
        hint: how to bring the peer about, while it was never seen.
        patience: seconds of silence, in the place of ``peer_wait``. One that lives is waited for
            as long as without.
    """

    def __init__(
        self,
        peer: PeerWatch,
        what: str,
        peer_wait: float,
        require_peer: bool,
        hint: str,
        patience: float | None = None,
    ) -> None:
        self._peer, self._what, self._hint = peer, what, hint
        self._peer_wait, self._require_peer = peer_wait, require_peer
        self._patience = peer_wait if patience is None else patience
        self._watched = self._blind = 0.0  # seconds, up to the last look
        self._heard, self._num_signs = 0.0, peer.num_signs  # `seconds` at the newest sign of life
        self._last_look = time.monotonic()
        # A peer that never showed life is most likely not started: say so soon, but give the
        # heart of one that is just here time to beat.
        self._next_status = STATUS_SECONDS if peer.seen else 2 * BEAT_SECONDS

    @property
    def seconds(self) -> float:
        """How long the wait has lasted, but for times in which this job did not look."""
        return self._watched + min(time.monotonic() - self._last_look, BLIND_SECONDS)

    def note_presence(self, saw_nothing: bool = False) -> None:
        """This job does not stand still: the time since the last call, or look, is waited time.

        Args:
            saw_nothing: it is not, because the disk failed meanwhile; for ``peer_wait`` seconds of
                the wait at most.
        """
        passed = self.seconds - self._watched
        if saw_nothing and self._blind < self._peer_wait:
            self._blind += passed
        else:
            self._watched += passed
        self._last_look = time.monotonic()

    def is_over(self) -> None:
        """What was waited for has come."""
        self._peer.longest_round = max(self._peer.longest_round, self.seconds)

    def is_quiet(self, seconds: float) -> bool:
        """Whether the peer has been silent for so long, and the wait is not to be given up yet."""
        return self._silent_seconds >= seconds and self._reason() is None

    def glance(self) -> bool:
        """Look up one name of the peer; whether there is a reason to look closer."""
        return self._peer.glance()

    def gave_up(self) -> str | None:
        """Observe the peer, say how things stand, and the reason for giving up once there is one.

        Raises:
            PeerError: in place of the reason, if the peer is required.
        """
        self.note_presence()
        self._peer.observe()
        reason = self._reason()
        if reason and self._require_peer:
            raise PeerError(f"{reason}, and --require_peer is set: waited for {self._what}")
        if not reason:
            self.say_status()
        return reason

    @property
    def _silent_seconds(self) -> float:
        """Of the wait, since a sign of life: times in which this job did not look do not count."""
        if self._peer.num_signs != self._num_signs:
            self._heard, self._num_signs = self.seconds, self._peer.num_signs
        return self.seconds - self._heard

    @property
    def _stall_limit(self) -> float:
        return STALL_FACTOR * max(self._peer_wait, self._peer.longest_round)

    def _reason(self) -> str | None:
        """Why the wait is to be given up; None if it is not."""
        if self._silent_seconds >= self._patience:
            state = "fell silent" if self._peer.seen else "did not come"
            return f"the {self._peer.job} {state} for {self._patience:g} s"
        if self.seconds >= self._stall_limit:
            return f"the {self._peer.job} lives but brought nothing for {self._stall_limit:.0f} s"
        return None

    def say_status(self) -> None:
        """Log how things stand, every few seconds."""
        if self.seconds < self._next_status:
            return
        self._next_status = self.seconds + STATUS_SECONDS
        silent = self._silent_seconds
        if not self._peer.seen:
            state = f"no {self._peer.job} yet, at most {self._patience:g} s. {self._hint}"
        elif silent < STATUS_SECONDS:
            state = f"the {self._peer.job} lives, at most {self._stall_limit:.0f} s"
        else:
            state = f"the {self._peer.job} is silent, for {silent:.0f} of {self._patience:g} s"
        logger.info("waiting for %s since %.0f s: %s", self._what, self.seconds, state)
