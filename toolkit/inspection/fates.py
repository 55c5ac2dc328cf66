"""The books of a run: every payload that a donor published has one fate, or waits for one.

Nobody writes down how many payloads were published, and records that nobody needs are deleted. But
their numbers follow one another from 0, so what is missing shows as a gap.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence

from toolkit.bridge.agreement import attempts_of
from toolkit.bridge.errors import PayloadError
from toolkit.bridge.ledger import Entry, read_path
from toolkit.bridge.transport import DirectoryTransport
from toolkit.inspection.report import Fates

NAMED = 5  # of the numbers that are wrong, so many are named


def numbers_present(transport: DirectoryTransport, donor: str) -> tuple[set[int], int]:
    """The numbers of a donor's records that are there or were refused, and the acknowledged one.

    Call it before the ledger is read: a record may be settled and deleted at any moment, but its
    fate is in the ledger before it is acknowledged, and it is acknowledged before it is deleted.
    A refused one is moved after its note was written, so notes are listed last.
    """
    acknowledged = transport.acknowledged(donor)
    return {*transport.sequences(donor), *transport.rejected(donor)}, acknowledged


def settle_books(
    transport: DirectoryTransport,
    donor: str,
    present: Collection[int],
    acknowledged: int,
    path: Sequence[Entry],
) -> Fates:
    """Compare what a donor published with what the receiver's ledger says.

    Args:
        transport: the run's transport.
        donor: its name.
        present: its records, see :func:`numbers_present`.
        acknowledged: the number below which its reader needs nothing.
        path: the ledger on the way to the receiver's present weights, read after these two.

    Raises:
        BridgeError: if an earlier part of the ledger is needed and cannot be read.
    """
    entries = [entry for entry in path if entry.donor == donor]
    times = Counter(entry.sequence for entry in entries)
    cursor = max(times, default=-1) + 1
    payloads = {n for n in present if n in times or not _is_end(transport, donor, n)}
    ends = set(present) - payloads
    waiting = payloads - set(times)
    pending = sum(n >= cursor for n in waiting)
    unaccounted = sorted(n for n in waiting if n < cursor)
    gaps = _gaps(payloads | ends | set(times), max(cursor, acknowledged))
    before: set[int] = set()
    if gaps:
        before = _settled_by_earlier_starts(transport, donor) - set(times) - set(present)
        gaps = _gaps(payloads | ends | set(times) | before, max(cursor, acknowledged))
    # A donor that ended and came back has gone on after its end, which may be deleted by now. The
    # newest record is never deleted.
    num_starts = len(attempts_of(transport, donor))
    may_have_ended = num_starts if max(present, default=-1) in ends else num_starts - 1
    num_gone = sum(end - start for start, end in gaps)
    num_ends_gone = max(0, min(num_gone, may_have_ended - len(ends)))
    counts = Counter(entry.fate for entry in entries)
    if num_gone > num_ends_gone:
        unaccounted = sorted([*unaccounted, *_first(gaps)])
    return Fates(
        donor=donor,
        published=len(set(times) | payloads) + num_gone - num_ends_gone,
        applied=counts["applied"],
        dropped=counts["dropped"],
        rejected=counts["rejected"],
        skipped=counts["skipped"],
        pending=pending,
        settled_before=len(before),
        reasons=_reasons(entries),
        unaccounted=unaccounted[:NAMED],
        repeated=sorted(n for n, count in times.items() if count > 1)[:NAMED],
    )


def _reasons(entries: Sequence[Entry]) -> dict[str, dict[str, int]]:
    reasons: dict[str, dict[str, int]] = {}
    for (fate, reason), count in sorted(Counter((e.fate, e.reason) for e in entries).items()):
        if reason:
            reasons.setdefault(fate, {})[reason] = count
    return reasons


def _is_end(transport: DirectoryTransport, donor: str, sequence: int) -> bool:
    """Whether a record says that a start of the donor is over; False if it cannot be read."""
    try:
        return transport.read_header(donor, sequence).kind == "end"
    except (FileNotFoundError, PayloadError):
        return False


def _settled_by_earlier_starts(transport: DirectoryTransport, donor: str) -> set[int]:
    starts, run_dir = attempts_of(transport, "receiver")[:-1], transport.root.parent
    return {e.sequence for start in starts for e in read_path(run_dir, start) if e.donor == donor}


def _gaps(known: Collection[int], end: int) -> list[tuple[int, int]]:
    """The ranges of numbers from 0 to ``end`` that are not known; each without its last number."""
    gaps, start = [], 0
    for number in sorted(known):
        if number >= end:
            break
        if number > start:
            gaps.append((start, number))
        start = number + 1
    return [*gaps, (start, end)] if start < end else gaps


def _first(gaps: Sequence[tuple[int, int]]) -> Iterator[int]:
    for start, end in gaps:
        yield from range(start, min(end, start + NAMED))
