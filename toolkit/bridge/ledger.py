"""The fate of every payload: applied, dropped, rejected, skipped, or still pending.

The counts are part of the receiver's checkpoint. The file beside them is the trail: one JSON line
per fate, one file per attempt of the receiver. An attempt that goes on from a checkpoint says so
in a line of its own, so that :func:`read_path` finds the fates that led to given weights.

It is not signed where the run has a key: nothing is applied on its word but in a replay, whose
payloads are signed and whose weights are compared with the run's.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

from toolkit.bridge import files
from toolkit.bridge.config import JOB_NAME
from toolkit.bridge.errors import BridgeError, PayloadError
from toolkit.bridge.reasons import Fate

_MAX_TRAIL_BYTES = 2**32  # a fate takes about 200


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """What became of one payload, at which receiver step, and why."""

    donor: str  # whose stream it is in
    sequence: int
    fate: Fate
    receiver_step: int
    reason: str = ""
    digest: str = ""  # of the payload's tensors, if it was applied


@dataclasses.dataclass(frozen=True, slots=True)
class Resumption:
    """That an attempt goes on from a checkpoint, and from which."""

    resumed_attempt: int  # the attempt that saved it ...
    receiver_step: int  # ... and after how many receiver steps


class Ledger:
    """Counts fates and appends them to ``path``.

    Args:
        path: the trail's file, or None on ranks that keep no trail.
        durable: whether :meth:`flush` returns only when the trail is on the disk.
    """

    def __init__(self, path: Path | None, *, durable: bool = False) -> None:
        self._path, self._durable = path, durable
        self._unwritten = ""
        self._torn_at: int | None = None  # where a failed try to write may have left half a line
        self.by_donor: dict[str, dict[str, int]] = {}

    def counts(self, donor: str) -> dict[str, int]:
        """How many payloads of one donor met which fate."""
        return self.by_donor.setdefault(donor, dict.fromkeys(get_args(Fate), 0))

    def note(self, entries: Iterable[Entry]) -> None:
        """Count ``entries``; they are in the trail after the next :meth:`flush`."""
        for entry in entries:
            self.counts(entry.donor)[entry.fate] += 1
            self._queue(entry)

    def resume(self, resumption: Resumption, by_donor: dict[str, dict[str, int]]) -> None:
        """Go on from a checkpoint and the counts in it; the trail says so from :meth:`flush` on."""
        self.by_donor = {donor: dict(counts) for donor, counts in by_donor.items()}
        self._queue(resumption)

    def _queue(self, line: Entry | Resumption) -> None:
        if self._path is not None:
            self._unwritten += json.dumps(dataclasses.asdict(line)) + "\n"

    def flush(self) -> None:
        """Append to the trail what is not in it yet; after an ``OSError`` it may be repeated."""
        if not self._unwritten or self._path is None:
            return
        with self._path.open("ab") as file:
            if self._torn_at is None:
                self._torn_at = file.tell()
            file.truncate(self._torn_at)
            file.write(self._unwritten.encode())
        is_new = self._torn_at == 0  # also where an earlier try has made the file, and failed
        if is_new:
            files.restrict(self._path)
        if self._durable:
            files.fsync_path(self._path)
            if is_new:
                files.fsync_path(self._path.parent)
        self._unwritten, self._torn_at = "", None


def trail_path(run_dir: Path, attempt: int) -> Path:
    """Where an attempt of the receiver keeps its trail."""
    return run_dir / "bridge" / "receiver" / f"ledger-{attempt:04d}.jsonl"


def read_path(run_dir: Path, attempt: int) -> list[Entry]:
    """The fates that led to the weights of one attempt of the receiver, in order.

    What an earlier attempt did after the checkpoint that was gone on from is not among them.

    Args:
        run_dir: the run's directory.
        attempt: that reached the weights.

    Raises:
        BridgeError: if a line is no line of a ledger.
    """
    path: list[Entry] = []
    trail = trail_path(run_dir, attempt)
    for line in _read_lines(trail):
        if isinstance(line, Entry):
            path.append(line)
            continue
        earlier = line.resumed_attempt
        if earlier > attempt:
            raise BridgeError(f"{trail} goes on from attempt {earlier}, which came after it")
        before = path if earlier == attempt else read_path(run_dir, earlier)
        path = [entry for entry in before if entry.receiver_step < line.receiver_step]
    return path


def _read_lines(trail: Path) -> list[Entry | Resumption]:
    try:
        text = files.read_plain(trail, _MAX_TRAIL_BYTES).decode()
    except FileNotFoundError:  # of an attempt that settled no payload
        return []
    except (OSError, ValueError, PayloadError) as error:
        raise BridgeError(f"{trail} cannot be read: {error}") from None
    # A kill can cut the last line short; no checkpoint was saved after that.
    return [_parse(trail, number, line) for number, line in enumerate(text.split("\n")[:-1], 1)]


def _parse(trail: Path, number: int, line: str) -> Entry | Resumption:
    try:
        fields: dict[str, Any] = json.loads(line)
        found = Resumption(**fields) if "resumed_attempt" in fields else Entry(**fields)
        for name in {"sequence", "receiver_step", "resumed_attempt"} & set(fields):
            if type(fields[name]) is not int:
                raise TypeError(f"{name} is {fields[name]!r}")
        if type(fields.get("digest", "")) is not str:
            raise TypeError(f"digest is {fields['digest']!r}")
        if isinstance(found, Entry) and not JOB_NAME.fullmatch(found.donor):
            raise ValueError(f"donor {found.donor!r} is no name of a job")
        if isinstance(found, Entry) and found.fate not in get_args(Fate):
            raise ValueError(f"fate {found.fate!r} is unknown")
    except (ValueError, TypeError) as error:
        raise BridgeError(f"line {number} of {trail} is no line of a ledger: {error}") from None
    return found
