"""Every word by which jobs and commands say what happened: what it means, and what to do about it.

One table for all. Who says such a word takes it from the types below, so type checking refuses one
that is not listed here; ``gradient-bridge reasons`` prints the table.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

Rejection = Literal[
    "truncated", "malformed", "digest", "alien", "schema", "nonfinite", "count", "unit",
    "too_large", "not_a_file", "missing", "unreadable", "alarm", "unauthenticated", "unknown",
]  # fmt: skip
Drop = Literal["stale", "superseded", "pruned"]
Fate = Literal["applied", "dropped", "rejected", "skipped"]
Alarm = Literal["zero", "idle head", "idle backbone", "norm", "flat loss"]
State = Literal["waiting", "alive", "silent", "ended"]
ExitStatus = Literal[0, 1, 2, 130, 141, 143]

UNKNOWN: Rejection = "unknown"
_OTHERS_WRITE = "see who else can write in the run's directory; a key shuts them out"


@dataclasses.dataclass(frozen=True, slots=True)
class Reason:
    """What a word means, and what its reader can do; nothing, where ``remedy`` is empty."""

    meaning: str
    remedy: str = ""


# Of records that must not reach a gradient; in brackets at the end of a log line.
REJECTIONS: Mapping[Rejection, Reason] = {
    "truncated": Reason(
        "the file ends early",
        "check the disk, and what copies or syncs the directory: the bridge shows whole files only",
    ),
    "malformed": Reason(
        "it is no record as this version writes them",
        f"the same version of the toolkit in all jobs; else {_OTHERS_WRITE}",
    ),
    "digest": Reason(
        "its bytes are not those that were written",
        "check the disk; gradient-bridge inspect --verify reads all records",
    ),
    "alien": Reason(
        "it is of another run, job or kind, or no record of a bridge",
        f"do not copy files between runs; if nobody did, {_OTHERS_WRITE}",
    ),
    "schema": Reason(
        "a tensor is missing or not shared, or has another shape or type",
        "build backbone and head alike in both jobs",
    ),
    "nonfinite": Reason(
        "a value is infinite or not a number",
        "look at the loss and the learning rate of the job that sent it",
    ),
    "count": Reason(
        "its number of samples is not finite and above 0",
        "give backward() the number of samples of the micro-batch",
    ),
    "unit": Reason(
        "its samples are counted in another unit", "the same BridgeConfig(unit=...) in both jobs"
    ),
    "too_large": Reason(
        "it is larger than any record of this run can be, or than memory", _OTHERS_WRITE
    ),
    "not_a_file": Reason(
        "a directory, link, pipe or device lies in its place", f"remove it, and {_OTHERS_WRITE}"
    ),
    "missing": Reason(
        "it is not there, though later ones are",
        "delete nothing in a run that goes on; mount NFS with lookupcache=positive",
    ),
    "unreadable": Reason(
        "the disk does not give it, or not every rank got the same bytes",
        "let the hosts of all ranks read the directory; the job's log names the disk's error",
    ),
    "alarm": Reason(
        "it raised an alarm, and --on_alarm is reject", "see that alarm; --on_alarm warn applies it"
    ),
    "unauthenticated": Reason(
        "it has no signature of this run's key",
        "the same GRADIENT_BRIDGE_KEY or --key_file for all jobs; if they have it, somebody else "
        "writes there",
    ),
    "unknown": Reason(
        "it was refused, and the note that says why cannot be read",
        "look into the log of the job that refused it",
    ),
}

# Of valid payloads that the receiver cannot use.
DROPS: Mapping[Drop, Reason] = {
    "stale": Reason(
        "it was taken at weights older than --max_staleness allows",
        "raise --max_staleness, or take --exchange delta, if they are many",
    ),
    "superseded": Reason(
        "it was taken at weights that the receiver has left: it was resumed since",
        "nothing: a few after each resume are normal",
    ),
    "pruned": Reason(
        "it was deleted before a receiver asked that went back to an older checkpoint",
        "resume from the newest checkpoint, or keep more (--checkpoints_total_limit)",
    ),
}

# Of every payload, one: in the receiver's ledger, results.json and gradient-bridge inspect.
FATES: Mapping[Fate | Literal["pending"], Reason] = {
    "applied": Reason("it is part of a step"),
    "dropped": Reason("it was valid, and of no use; see the reason"),
    "rejected": Reason("it must not reach a gradient, and lies aside; see the reason"),
    "skipped": Reason(
        "the donor had no finite gradient, and said so",
        "look at its loss and its loss scale, if they are many",
    ),
    "pending": Reason("it is published, and no step has judged it yet"),
}

# Of payloads that are valid and strange; in log lines ALARM, results.json and the tracker.
ALARMS: Mapping[Alarm, Reason] = {
    "zero": Reason("its gradients are exactly zero", "is its data empty, or its loss constant?"),
    "idle head": Reason(
        "its gradients for its own head are exactly zero", "is the head frozen or detached?"
    ),
    "idle backbone": Reason(
        "its gradients for the backbone are exactly zero", "is the backbone frozen or detached?"
    ),
    "norm": Reason(
        "the norm of its gradient is over 30 times the usual",
        "look at its data and its loss; --max_donor_norm bounds each donor's part",
    ),
    "flat loss": Reason(
        "its loss has fallen by less than 5% since its first payloads",
        "are these the labels, and the data, of this head?",
    ),
}

# Of jobs, in gradient-bridge inspect.
STATES: Mapping[State, Reason] = {
    "waiting": Reason(
        "its heart beats, and no partner has ever joined the run",
        "start the other job; after --peer_wait seconds it trains alone",
    ),
    "alive": Reason("its heart beats"),
    "silent": Reason(
        "it has not ended, and its heart does not beat: it was killed, or its host or disk is gone",
        "start it again, with --resume_from_checkpoint latest if it has a checkpoint",
    ),
    "ended": Reason("it has published its end"),
}

# Of the jobs and of the commands; each command's --help says more.
EXIT_STATUSES: Mapping[ExitStatus, Reason] = {
    0: Reason("all went well"),
    1: Reason(
        "the job failed, or the command found something wrong",
        "the error, or the report, says what",
    ),
    2: Reason(
        "the command could not do its work: wrong flags, no such run, a run that cannot be "
        "replayed",
        "the error says what; see --help",
    ),
    130: Reason("ended by Ctrl-C", "--resume_from_checkpoint latest goes on"),
    141: Reason("nobody read the command's output to its end, as after `| head`"),
    143: Reason(
        "ended by SIGTERM, as schedulers send it", "--resume_from_checkpoint latest goes on"
    ),
}
