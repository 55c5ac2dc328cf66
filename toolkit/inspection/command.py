"""``gradient-bridge inspect``: what the jobs of a run have written, as tables or as JSON.

It only reads: no file is made, changed, moved or acknowledged, and no job is disturbed.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from toolkit.bridge.authentication import UNSIGNED, Signer, load_key
from toolkit.bridge.errors import BridgeError
from toolkit.bridge.liveness import BEAT_SECONDS, SILENT_BEATS
from toolkit.bridge.runs import runs_in
from toolkit.inspection.report import FORMAT, Report, Run
from toolkit.inspection.run import Look
from toolkit.inspection.tables import print_run, print_runs
from toolkit.inspection.verify import Verification
from toolkit.terminal import Output, report_error

OK, WRONG, UNUSABLE = 0, 1, 2  # exit statuses
_LOOK_SECONDS = 0.05  # between two looks at the heartbeats


def find_runs(name: str | None, runs_dir: Path) -> tuple[Path, list[Path]]:
    """What is to be inspected: one run, or all runs of a directory.

    Args:
        name: a path, or the name of a run in ``runs_dir``; None for ``runs_dir`` itself.
        runs_dir: where runs are.

    Returns:
        The directory that is meant, and the runs; a run is its own only one.

    Raises:
        BridgeError: if there is none.
        OSError: if a directory cannot be listed.
    """
    candidates = [runs_dir] if name is None else [Path(name), runs_dir / name]
    for path in candidates:
        if (path / "bridge").is_dir():
            return path, [path]
        if path.is_dir() and (runs := runs_in(path)):
            return path, runs
    raise BridgeError(
        f"there is no run in {' or in '.join(map(str, dict.fromkeys(candidates)))}. Give the "
        "--runs_dir of the jobs, or one run of it, such as runs/0001"
    )


def watch(
    runs: Sequence[Path], seconds: float, signer: Signer = UNSIGNED
) -> tuple[list[Look], float]:
    """Begin a look at each run, and watch all their jobs at the same time.

    Args:
        runs: their directories.
        seconds: to watch for a sign of life, at most.
        signer: with the runs' key, if they have one.

    Returns:
        The looks, and the seconds for which was watched.
    """
    start = time.monotonic()
    looks = [Look(run, signer) for run in runs]
    while True:
        watched = time.monotonic() - start
        are_clear = [look.is_clear(watched) for look in looks]
        if all(are_clear) or watched >= seconds:
            return looks, watched
        time.sleep(_LOOK_SECONDS)


def verify(looks: Sequence[Look], runs: Sequence[Run], progress: Progress) -> list[Run]:
    """Read every record of these runs; what was found is added to the runs."""
    checks = [Verification(*pair) for pair in zip(looks, runs, strict=True)]
    task = progress.add_task("verifying", total=sum(len(check.places) for check in checks))
    return [check.read(lambda: progress.advance(task)) for check in checks]


def run_inspect(args: argparse.Namespace) -> int:
    """Inspect runs and print what was found; the exit status."""
    console, errors = Output(), Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    seconds = args.seconds or SILENT_BEATS * BEAT_SECONDS
    try:
        signer = Signer(load_key(args.key_file))
        directory, found = find_runs(args.directory, args.runs_dir)
        with errors.status(f"watching heartbeats, {seconds:g} s at most"):
            looks, watched = watch(found, seconds, signer)
            runs = [look.report() for look in looks]
        if args.verify:
            with Progress(*columns, TimeElapsedColumn(), console=errors) as progress:
                runs = verify(looks, runs, progress)
    except (BridgeError, OSError) as error:
        report_error(error, as_json=args.json, directory=args.directory)
        return UNUSABLE
    report = Report(format=FORMAT, directory=str(directory), watched_seconds=watched, runs=runs)
    if args.json:
        print(json.dumps(report.as_json(), indent=2))
    elif found == [directory]:
        print_run(report, console)
    else:
        print_runs(report, console)
    return OK if report.ok else WRONG
