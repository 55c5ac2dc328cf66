"""How a job waits: for other jobs, for a disk that fails, for what it writes beside its steps.

Every wait is the same on all ranks, ends in a stated time, and is broken off by a signal.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from toolkit.bridge.background import Background
from toolkit.bridge.config import BridgeConfig, Role
from toolkit.bridge.control import ControlGroup
from toolkit.bridge.interruption import Interruption
from toolkit.bridge.liveness import Heartbeat, PeerWatch, Wait
from toolkit.bridge.outage import ride_out, riding_out
from toolkit.bridge.resting import Rest

T = TypeVar("T")


class Waiting:
    """The waits of one job.

    Args:
        control: of its ranks.
        config: its settings; ``peer_wait`` bounds all waits.
        role: what it is.
        run_dir: of its run.
        heart: of this job, on the main process.

    Attributes:
        interruption: a signal to this process, which ends waits.
        rest: main process: says when to leave the file system alone.
        background: main process: a write that no step waits for.
    """

    def __init__(
        self,
        control: ControlGroup,
        config: BridgeConfig,
        role: Role,
        run_dir: Path,
        heart: Heartbeat | None,
    ) -> None:
        self._control, self._config, self._role, self._run_dir = control, config, role, run_dir
        self.interruption = Interruption()
        self.rest = Rest(heart)
        self.background = Background()
        self._peer_seconds, self._step_began = 0.0, time.monotonic()

    def decide(self, poll: Callable[[], T | None], grace: float) -> T:
        """What ``poll`` has found on the main process, on every rank. A collective.

        A poll that fails with an ``OSError`` is repeated.

        Args:
            poll: looks once; None for not yet.
            grace: seconds after a signal at which the wait is broken off.

        Raises:
            DiskError: if the disk fails for ``peer_wait`` seconds.
            Interrupted: after a signal.
        """
        return self._decide(poll, grace)[0]

    def decide_on_peers(self, poll: Callable[[], T | None], grace: float) -> T:
        """:meth:`decide`, where the other jobs are waited for: :meth:`metrics` count it."""
        outcome, seconds = self._decide(poll, grace)
        self._peer_seconds += seconds
        return outcome

    def _decide(self, poll: Callable[[], T | None], grace: float) -> tuple[T, float]:
        def awake() -> T | None:
            try:
                return poll()
            except OSError:
                self.rest.wake()
                raise

        riding = riding_out(awake, self._run_dir, self._config.peer_wait)
        return self._control.decide(self.interruption.bounding(riding, grace))

    def persist(self, action: Callable[[], T], grace: float = math.inf) -> T:
        """What ``action`` returns on the main process, once the disk lets it. A collective.

        The other ranks follow in slices, as in every wait, so that no collective times out.

        Args:
            action: may be repeated after an ``OSError``.
            grace: seconds after a signal at which it is given up. Not within a step: one that is
                half done is in no checkpoint.

        Raises:
            DiskError: if the disk fails for ``peer_wait`` seconds.
        """
        (outcome,) = self.decide(lambda: (action(),), grace)
        return outcome

    def write_behind(self, action: Callable[[], object]) -> None:
        """Begin a write that no step waits for (main process), after :meth:`catch_up`.

        It must touch nothing that this thread changes meanwhile. It is tried again while the disk
        fails; what it raises is raised by the next :meth:`catch_up`.
        """
        directory, patience = self._run_dir, self._config.peer_wait
        self.background.start(lambda: ride_out(action, directory, patience))

    def catch_up(self, grace: float = math.inf) -> None:
        """Wait for the write that :meth:`write_behind` has begun. A collective."""
        # A donor is told by the receiver, its main process alone, whether a step waits for it.
        if self._config.writes_behind or self._role == "donor":
            self.decide(lambda: self.background.check() or None, grace)

    def begin(self, peer: PeerWatch, what: str, patience: float | None = None) -> Wait:
        """Begin a wait for something of another job (main process).

        Args:
            peer: that job.
            what: what is waited for.
            patience: seconds of silence after which it is given up; by default ``peer_wait``.
        """
        config = self._config
        recipe = "receiver" if self._role == "donor" else "donor"
        hint = f"Start it now, for instance: accelerate launch recipes/{recipe}.py"
        if str(config.runs_dir) != "runs":
            hint += f" --runs_dir {config.runs_dir}"
        if config.run is not None:
            hint += f" --run {config.run}"
        return Wait(peer, what, config.peer_wait, config.require_peer, hint, patience)

    def metrics(self) -> dict[str, float]:
        """How long this job has waited for other ones since the last call, by tag."""
        waited, self._peer_seconds = self._peer_seconds, 0.0
        began, self._step_began = self._step_began, time.monotonic()
        share = waited / max(waited, self._step_began - began) if waited else 0.0
        return {"bridge/wait (s)": waited, "bridge/wait (% of the step)": 100.0 * share}
