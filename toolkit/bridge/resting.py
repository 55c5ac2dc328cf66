"""A job whose peers have long been silent asks little of the file system that they share.

A heart beats every second, however long a round takes. Where every peer that is waited for has
been silent for ten beats, this job only glances now and then at one name of each of them: a heart
that moves again, or the directory in which a job that never came will appear. Its own heart beats
half as often. Together with a whole look now and then, for what a glance does not show, that is at
most two operations on names a second, for however many peers.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from toolkit.bridge.liveness import BEAT_SECONDS, Heartbeat, Wait

QUIET_SECONDS = 10 * BEAT_SECONDS
GLANCE_SECONDS = 2.0  # between two glances at one peer, times the peers waited for
LOOK_SECONDS = 60.0  # between two whole looks, times the peers waited for


class Rest:
    """Says when to leave the file system alone; on the main process.

    Args:
        heart: of this job, which rests too; None for none.
    """

    def __init__(self, heart: Heartbeat | None) -> None:
        self._heart = heart
        self._next_glance = self._next_look = self._awake_until = 0.0
        self._was_blind = False

    def lasts(self, waits: Sequence[Wait]) -> bool:
        """Whether this poll shall not look at the file system. Glances at the peers if it is time.

        Never where a wait is to be given up: that takes a whole look before.

        Args:
            waits: those that are not over; none at all means that a look is due.
        """
        # Where this job's heart cannot beat, those of the peers may not be able to either.
        is_blind = self._was_blind or (self._heart is not None and self._heart.fails)
        for wait in waits:
            wait.note_presence(saw_nothing=is_blind)
        self._was_blind = False
        rests = self._lasts(waits)
        if self._heart is not None:
            self._heart.rests = rests
        for wait in waits if rests else ():
            wait.say_status()
        return rests

    def wake(self) -> None:
        """A look has failed: it could not see who lives, and the next one comes soon."""
        self._awake_until = time.monotonic() + QUIET_SECONDS
        self._was_blind = True

    def _lasts(self, waits: Sequence[Wait]) -> bool:
        now, number = time.monotonic(), len(waits)
        is_quiet = all(wait.is_quiet(QUIET_SECONDS) for wait in waits)
        if not waits or not is_quiet or now < self._awake_until:
            return False
        if now >= self._next_look:
            self._next_look = now + LOOK_SECONDS * number
            self._next_glance = now + GLANCE_SECONDS * number
            return False
        if now >= self._next_glance:
            self._next_glance = now + GLANCE_SECONDS * number
            glances = [wait.glance() for wait in waits]
            if any(glances):
                self._awake_until = now + QUIET_SECONDS  # what has stirred may take its time
                return False
        return True
