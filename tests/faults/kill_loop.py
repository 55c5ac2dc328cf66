"""Half an hour in which jobs are killed again and again: the weights come out as without.

    python -m tests.faults.kill_loop --minutes 30

Both recipes are launched as users launch them, with two ranks each. Every few seconds a job, one of
its ranks or both jobs get SIGKILL, at whatever they are doing, and are started again. A kill waits
for some steps since the last one, mostly: where a start takes longer than the pauses, no step
would ever be taken.
"""

from __future__ import annotations

import argparse
import random
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from tests.faults.supervision import (
    JOBS,
    LaunchedJob,
    Outcome,
    Run,
    conclude,
    parse_arguments,
)
from tests.launching import ROOT, Launcher

STEPS = 400  # of a round
SECONDS, PAYLOADS = (1.0, 8.0), 100  # between two kills: at least, and at most so many payloads


class KilledRun(Run):
    """A run whose jobs are killed until a deadline.

    Args:
        deadline: on the monotonic clock; kills come before it.
        rng: chooses who is killed, and when.
        bar: shows the time.
    """

    steps, checkpointing_steps = STEPS, 25

    def __init__(
        self,
        directory: Path,
        launcher: Launcher,
        deadline: float,
        rng: random.Random,
        bar: tqdm[NoReturn],
    ) -> None:
        super().__init__(directory, launcher, [])
        self._deadline, self._rng, self._bar = deadline, rng, bar
        self.kills = dict.fromkeys(JOBS, 0)
        self._plan_next(time.monotonic())

    def _launch(self, name: str, log: Path, flags: Sequence[str]) -> LaunchedJob:
        assert self._launcher is not None
        return LaunchedJob(self._launcher, log, ROOT / "recipes" / f"{name}.py", *flags)

    def _num_ending(self, name: str) -> int:
        return self.kills[name]

    def _plan_next(self, now: float) -> None:
        self._next_time = now + self._rng.uniform(*SECONDS)
        self._next_payload = self._newest_payload() + self._rng.randrange(PAYLOADS)

    def _newest_payload(self) -> int:
        records = self.run_dir / "bridge" / "donor" / "records"
        return max((int(path.stem) for path in records.glob("[0-9]*.safetensors")), default=-1)

    def _look(self) -> bool:
        now = time.monotonic()
        if now >= self._deadline:
            return super()._look()
        self._bar.update(round(self._bar.total + now - self._deadline) - self._bar.n)
        if now >= self._next_time and self._newest_payload() >= self._next_payload:
            self._plan_next(now)
            for name in self._rng.choice([("receiver",), ("donor",), JOBS]):
                self._kill(name)
        return super()._look()

    def _kill(self, name: str) -> None:
        handle = self._handles[name]
        assert isinstance(handle, LaunchedJob)
        if handle.poll() is not None:
            return
        self.kills[name] += 1
        ranks = [p for p in handle.job.processes() if p.pid != handle.job.process.pid]
        if len(ranks) == 2 and self._rng.random() < 0.5:
            self._rng.choice(ranks).kill()  # its launcher ends the other one
        else:
            handle.kill()


def kill_loop(minutes: float, seed: int, output: Path) -> tuple[list[Outcome], int]:
    """Rounds of ``STEPS`` steps until the time is over; the first one is left in peace.

    Returns:
        What each round came to, and how many jobs were killed in all.
    """
    rng, outcomes, kills = random.Random(seed), [], 0
    with Launcher(output) as launcher, tqdm(total=round(60 * minutes), unit="s") as bar:
        peace = KilledRun(output / "peace", launcher, 0.0, rng, bar)
        peace.finish(None)
        outcomes.append(peace.outcome)
        deadline = time.monotonic() + 60 * minutes
        while time.monotonic() < deadline and not outcomes[-1].problems:
            directory = output / f"round-{len(outcomes)}"
            run = KilledRun(directory, launcher, deadline, rng, bar)
            run.finish(peace.weights)
            outcomes.append(run.outcome)
            kills += sum(run.kills.values())
            bar.set_postfix(kills=kills, rounds=len(outcomes) - 1)
            if not run.outcome.problems:
                shutil.rmtree(run.directory)
    return outcomes, kills


def main() -> None:
    """The loop from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--minutes", type=float, default=30.0)
    args = parse_arguments(parser)
    outcomes, kills = kill_loop(args.minutes, args.seed, args.output)
    report = {
        "rounds": len(outcomes) - 1,
        "steps of a round": STEPS,
        "jobs killed": kills,
        "starts of jobs": sum(outcome.starts for outcome in outcomes[1:]),
    }
    conclude(report, outcomes, args.output)


if __name__ == "__main__":
    main()
