"""What ``gradient-bridge inspect`` prints: one line for each run, or the tables of one run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from rich.console import Console, JustifyMethod
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from toolkit.inspection.report import Fates, Job, Report, Run

NAMED = 3  # of names in a sentence, so many
LISTED = 20  # of the things that are wrong with a run, so many
_WORDS = "see gradient-bridge reasons"
_FATES = ("applied", "dropped", "rejected", "skipped", "pending")


def print_runs(report: Report, console: Console) -> None:
    """One line for each of several runs."""
    columns = "run", "exchange", "jobs", "#step", "#payloads", "fates", "#on disk"
    table = _table(f"Runs in {report.directory}", *columns)
    for run in report.runs:
        steps = [job.receiver_step for job in run.jobs if job.receiver_step is not None]
        table.add_row(
            _shown(run.name),
            _shown(run.exchange or ""),
            _shown(", ".join(f"{job.name} {job.state}" for job in run.jobs) or "nobody yet"),
            _number(max(steps, default=None)),
            str(sum(books.published for books in run.fates)),
            _sum_of_fates(run.fates),
            decimal(run.num_bytes),
        )
    console.print(table)
    console.print()
    read = [run.verified for run in report.runs if run.verified is not None]
    if read:
        num_records, num_bytes = sum(v.num_records for v in read), sum(v.num_bytes for v in read)
        _say(console, _verified(num_records, num_bytes, sum(len(v.bad) for v in read)))
    _print_problems(report, console)


def print_run(report: Report, console: Console) -> None:
    """All about the only run of a report."""
    (run,) = report.runs
    terms = f"exchange {run.exchange or '?'}, id {run.run_id or '?'}"
    _say(console, f"Run {run.directory}: {terms}, {decimal(run.num_bytes)} on disk")
    console.print()
    for table in (_jobs(run.jobs), _fates(run), _streams(run)):
        if table.row_count:
            console.print(table)
            console.print()
    if not run.jobs:
        _say(console, "nobody has joined it yet")
    for remark in _remarks(run):
        _say(console, remark)
    _print_problems(report, console)


def _print_problems(report: Report, console: Console) -> None:
    for run in report.runs:
        place = f"run {run.name}: " if len(report.runs) > 1 else ""
        for problem in run.problems[:LISTED]:
            _say(console, place + problem, "WRONG: ")
        if (more := len(run.problems) - LISTED) > 0:
            _say(console, f"{place}{more} more things, see --json", "WRONG: ")
    if report.ok:
        _say(console, "nothing is wrong")


def _say(console: Console, sentence: str, warning: str = "") -> None:
    console.print(Text(warning, style="bold red") + _shown(sentence), soft_wrap=True)


def _shown(text: str) -> Text:
    """Text from the disk, without what a terminal would take as a command."""
    return Text("".join(c if c.isprintable() else ascii(c)[1:-1] for c in text))


def _number(value: int | None) -> str:
    return "" if value is None else str(value)


def _sum_of_fates(fates: Sequence[Fates]) -> Text:
    sums = {fate: sum(getattr(books, fate) for books in fates) for fate in _FATES}
    counts = Text(", ".join(f"{count} {fate}" for fate, count in sums.items() if count))
    if all(books.adds_up for books in fates):
        return counts
    return Text("do not add up: ", style="bold red") + counts


def _table(title: str, *columns: str) -> Table:
    """A table; columns of numbers have a ``#`` before their name."""
    table = Table(
        title=_shown(title), title_justify="left", title_style="bold", box=None,
        header_style="underline", padding=(0, 2, 0, 0), pad_edge=False,
    )  # fmt: skip
    for column in columns:
        is_number = column.startswith("#")
        justify: JustifyMethod = "right" if is_number else "left"
        table.add_column(column.lstrip("#"), justify=justify, no_wrap=is_number, overflow="fold")
    return table


def _jobs(jobs: Sequence[Job]) -> Table:
    steps = "#receiver step", "#donor step"
    table = _table("Jobs", "job", "state", *steps, "heads", "#start", "#pid", "host")
    for job in jobs:
        table.add_row(
            _shown(job.name), job.state, _number(job.receiver_step), _number(job.donor_step),
            _shown(", ".join(job.heads)), str(job.start), _number(job.pid), _shown(job.host or ""),
        )  # fmt: skip
    return table


def _fates(run: Run) -> Table:
    columns = [f"#{name}" for name in (*_FATES, "published")]
    table = _table("Payloads by their fate", "donor", *columns, "adds up")
    for books in run.fates:
        counts = [str(getattr(books, fate)) for fate in _FATES]
        adds_up = Text("yes") if books.adds_up else Text("NO", style="bold red")
        table.add_row(_shown(books.donor), *counts, str(books.published), adds_up)
    return table


def _streams(run: Run) -> Table:
    numbers = "#published", "#present", "#kept", "#rejected", "#alien", "#needed from", "#on disk"
    table = _table("Records", "stream", *numbers)
    for stream in run.streams:
        needed_from = str(stream.acknowledged) if stream.carries == "payloads" else ""
        table.add_row(
            _shown(stream.name), str(stream.published), str(stream.present),
            str(stream.kept), str(sum(stream.rejected.values())), str(len(stream.alien)),
            needed_from, decimal(stream.num_bytes),
        )  # fmt: skip
    return table


def _remarks(run: Run) -> Iterator[str]:
    """What the tables do not say, in sentences."""
    for job in run.jobs:
        if job.compression not in (None, "none"):
            yield f"payloads of {job.name} are compressed: {job.compression}"
    for head, classes in run.class_names.items():
        yield f"classes of {head}, from 0 on: {_names(classes)}"
    for books in run.fates:
        if books.reasons:
            reasons = [
                f"{count} {fate} ({reason})"
                for fate, counts in books.reasons.items()
                for reason, count in counts.items()
            ]
            yield f"payloads of {books.donor}: {', '.join(reasons)} ({_WORDS})"
        if books.settled_before:
            yield (
                f"{books.settled_before} more payloads of {books.donor} were settled by a "
                "start of the receiver that its present weights do not come from"
            )
    for stream in run.streams:
        if stream.rejected:
            counts = _counts(stream.rejected)
            yield f"records of {stream.name} that were put aside: {counts} ({_WORDS})"
        if stream.alien:
            yield f"no records, but among those of {stream.name}: {_names(stream.alien)}"
    if run.temporary_files:
        size = decimal(sum(file.num_bytes for file in run.temporary_files))
        lives = any(job.state in ("alive", "waiting") for job in run.jobs)
        state = "left behind by a crash, or still being written" if lives else "safe to delete"
        names = _names([file.path for file in run.temporary_files])
        yield f"temporary files, {size}, {state}: {names}"
    if (verified := run.verified) is not None:
        yield _verified(verified.num_records, verified.num_bytes, len(verified.bad))


def _verified(num_records: int, num_bytes: int, num_bad: int) -> str:
    return f"{num_records} records read and verified, {decimal(num_bytes)}: {num_bad} bad"


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def _names(names: Sequence[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")
