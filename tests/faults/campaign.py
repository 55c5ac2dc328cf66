"""Many faults in many runs, each of which must end in the weights of joint training.

    python -m tests.faults.campaign forked --faults 850
    python -m tests.faults.campaign launched --faults 150

``launched`` starts both jobs by ``accelerate launch`` with two ranks each; ``forked`` forks them,
of one process each, from a process that has imported everything. What has died is started again.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import itertools
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from tests.faults.injector import (
    BYTES,
    DELAY,
    ERRORS,
    FAILING,
    KILL,
    MAIN_POINTS,
    RANK_POINTS,
    START,
    STOP,
    Fault,
)
from tests.faults.supervision import JOBS, STEPS, Outcome, Run, conclude, parse_arguments
from tests.launching import Launcher

FAULTS_PER_RUN = {"forked": 14, "launched": 28}


def all_faults(num_processes: int, rng: random.Random) -> list[Fault]:
    """Every fault at every point of every process, at random steps and in random order."""
    faults = []

    def add(job: str, rank: int, point: str, actions: Sequence[str]) -> None:
        for action in actions:
            early = point.startswith(("attach", "resume", "end"))
            faults.append(Fault(job, rank, START if early else rng.randrange(STEPS), point, action))

    for job, rank in itertools.product(JOBS, range(num_processes)):
        for point in (*RANK_POINTS[job], *(MAIN_POINTS[job] if rank == 0 else ())):
            halves = "half" in point
            add(job, rank, point, [KILL] if halves else [KILL, rng.choice([STOP, DELAY])])
        if rank == 0:
            for point in FAILING:
                add(job, rank, point, ERRORS)
            add(job, rank, "publish: written", BYTES)
    rng.shuffle(faults)
    return faults


def plans(num_processes: int, size: int, rng: random.Random) -> Iterator[list[Fault]]:
    """Plans of ``size`` faults for one run each, without end."""
    waiting: list[Fault] = []
    while True:
        while len(waiting) < size:
            waiting += all_faults(num_processes, rng)
        yield waiting[:size]
        del waiting[:size]


def campaign(mode: str, num_faults: int, seed: int, output: Path) -> list[Outcome]:
    """Put in at least ``num_faults`` faults; a run without any comes first.

    Args:
        mode: ``forked`` or ``launched``.
        num_faults: that were really used, over all runs.
        seed: of the plans.
        output: a directory; those of runs without a problem are deleted.
    """
    outcomes: list[Outcome] = []
    rng = random.Random(seed)
    with contextlib.ExitStack() as stack:
        launcher = None
        if mode == "launched":
            launcher = stack.enter_context(Launcher(output))
        undisturbed = Run(output / "undisturbed", launcher, [])
        undisturbed.finish(None)
        if undisturbed.outcome.problems:
            return [undisturbed.outcome]
        bar = stack.enter_context(tqdm(total=num_faults, desc=mode, unit="fault"))
        todo = plans(undisturbed.num_processes, FAULTS_PER_RUN[mode], rng)
        for number, faults in enumerate(todo, 1):
            if launcher is not None:
                launcher.jobs.clear()
            run = Run(output / f"run-{number}", launcher, faults)
            run.finish(undisturbed.weights)
            outcomes.append(run.outcome)
            bar.update(len(run.outcome.used))
            for problem in run.outcome.problems:
                bar.write(problem)
            if not run.outcome.problems:
                shutil.rmtree(run.directory)
            if sum(len(outcome.used) for outcome in outcomes) >= num_faults:
                break
    return outcomes


def main() -> None:
    """A campaign from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("mode", choices=["forked", "launched"])
    parser.add_argument("--faults", type=int, default=100)
    args = parse_arguments(parser)
    start = time.monotonic()
    outcomes = campaign(args.mode, args.faults, args.seed, args.output)
    used = [fault for outcome in outcomes for fault in outcome.used]
    points = {(fault.job, fault.rank, fault.point) for fault in used}
    every = all_faults(1 if args.mode == "forked" else 2, random.Random(0))
    unused = {(fault.job, fault.rank, fault.point) for fault in every} - points
    report = {
        "mode": args.mode,
        "runs": len(outcomes),
        "faults": len(used),
        "by action": dict(sorted(collections.Counter(fault.action for fault in used).items())),
        "points": len(points),
        "points without a fault": sorted(unused),
        "starts of jobs": sum(outcome.starts for outcome in outcomes),
        "payloads rejected": sum(outcome.rejected for outcome in outcomes),
        "seconds": round(time.monotonic() - start),
    }
    conclude(report, outcomes, args.output)


if __name__ == "__main__":
    main()
