"""``gradient-bridge doctor``: what the file system at a directory gives, and what follows from it.

Everything is measured in a new directory below the given one, which is deleted at the end, after an
error and after Ctrl-C too. A second process on this host plays the other job.
"""

from __future__ import annotations

import argparse
import errno
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from toolkit.bridge.errors import BridgeError
from toolkit.doctor.advice import advise, exchange_seconds
from toolkit.doctor.measures import find_place, measure_costs, try_promises
from toolkit.doctor.peer import Peer
from toolkit.doctor.report import FORMAT, Report, Times
from toolkit.terminal import Output, report_error

USABLE, UNUSABLE = 0, 1  # exit statuses
NUM_STAGES = 6  # that the progress display counts
_FULL = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


def examine(
    directory: Path,
    seconds: float,
    payload_bytes: int,
    step_seconds: float,
    stage: Callable[[str], None],
) -> Report:
    """Measure in a directory of its own below ``directory``.

    Args:
        directory: where the jobs' runs are to be.
        seconds: to measure for, about.
        payload_bytes: that cross at a time.
        step_seconds: of a training step.
        stage: told what is done now.

    Raises:
        BridgeError: if nothing can be measured there.
    """
    if not directory.is_dir():
        state = "is no directory" if directory.exists() else "does not exist"
        raise BridgeError(f"{directory} {state}: give the directory that both jobs will share")
    place = find_place(directory)
    # A file that is too large for the place would fill it.
    written_bytes = max(1, min(payload_bytes, place.free_bytes // 4))
    try:
        with (
            tempfile.TemporaryDirectory(prefix=".gradient-bridge-doctor-", dir=directory) as name,
            Peer(Path(name)) as peer,
        ):
            stage("two processes make the same names")
            promises = try_promises(Path(name), peer, seconds / 4)
            other = peer if promises.hard_links else None
            costs = measure_costs(Path(name), other, 3 * seconds / 4, written_bytes, stage)
    except OSError as error:
        raise BridgeError(_explain(error, directory)) from None
    stage("done")
    return Report(
        format=FORMAT,
        directory=str(directory),
        payload_bytes=payload_bytes,
        step_seconds=step_seconds,
        exchange_seconds=exchange_seconds(costs, payload_bytes),
        place=place,
        promises=promises,
        costs=costs,
        advice=advise(directory, place, promises, costs, payload_bytes, step_seconds),
    )


def _explain(error: OSError, directory: Path) -> str:
    if error.errno in _FULL:
        return f"{directory} is full ({error.strerror}): delete old runs, or give another directory"
    if error.errno in _FORBIDDEN:
        return (
            f"cannot write in {directory} ({error.strerror}): give a directory in which the users "
            "of both jobs may write"
        )
    return f"{directory} cannot be used: {error}"


# -- as text --------------------------------------------------------------------------------------


def _table(report: Report) -> Table:
    place, promises, costs = report.place, report.promises, report.costs
    table = Table(title=f"File system at {report.directory}", show_header=False)
    inodes = "no limit of files" if place.free_inodes is None else f"{place.free_inodes:,} files"
    rows = {
        "file system": f"{place.file_system or 'unknown'}, mounted at {place.mount_point or '?'}",
        "free": f"{decimal(place.free_bytes)}, {inodes}",
        "longest name": f"{place.max_name_bytes} bytes",
        "mode of the directory": place.mode,
        "hard links": _yes(promises.hard_links),
        "two processes, one name: one wins": ", ".join(
            f"{name} {_yes(kept)}"
            for name, kept in (
                ("link", promises.link_never_replaces),
                ("O_EXCL", promises.create_is_exclusive),
                ("mkdir", promises.mkdir_is_exclusive),
            )
        ),
        "replacing a file is atomic": _yes(promises.rename_is_atomic),
        "pread, mmap": f"{_yes(promises.pread_is_right)}, {_yes(promises.mmap_is_right)}",
        "sync of a small file": _times(costs.fsync_file),
        "sync of a directory": _times(costs.fsync_directory),
        "publishing a small record": _times(costs.publish),
        "until another process has it": _times(costs.visibility),
        f"writing {decimal(costs.written_bytes)}, synced": _rate(costs.write_bytes_per_second),
        f"reading {decimal(costs.written_bytes)}": _rate(costs.read_bytes_per_second),
        "its clock less this host's": f"{1000 * costs.clock_skew:+.0f} ms",
    }
    for name, value in rows.items():
        table.add_row(name, Text(value))
    return table


def _yes(kept: bool | None) -> str:
    return "not tried" if kept is None else "yes" if kept else "NO"


def _times(times: Times | None) -> str:
    if times is None:
        return "never"
    return f"p50 {1e3 * times.p50:.2f} ms, p99 {1e3 * times.p99:.2f} ms ({times.num_tries} times)"


def _rate(bytes_per_second: float) -> str:
    return f"{decimal(int(bytes_per_second))}/s"


def run_doctor(args: argparse.Namespace) -> int:
    """Examine a directory and print what was found; the exit status."""
    console, errors = Output(), Console(stderr=True)
    directory = Path(args.directory)
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    try:
        with Progress(*columns, console=errors, transient=True) as progress:
            task = progress.add_task("starting", total=NUM_STAGES)
            report = examine(
                directory,
                args.seconds,
                int(args.payload_mib * 2**20),
                args.step_seconds,
                lambda name: progress.update(task, advance=1, description=name),
            )
    except BridgeError as error:
        report_error(error, as_json=args.json, directory=args.directory, usable=False)
        return UNUSABLE
    if args.json:
        print(json.dumps(report.as_json(), indent=2))
    else:
        console.print(_table(report))
        advice = report.advice
        for prefix, sentences in (
            ("CANNOT BE USED: ", advice.obstacles), ("", advice.reasons), ("note: ", advice.notes)
        ):  # fmt: skip
            for sentence in sentences:
                console.print(Text(prefix + sentence), soft_wrap=True)
    return USABLE if report.usable else UNUSABLE
