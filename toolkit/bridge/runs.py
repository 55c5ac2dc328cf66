"""Which run a job belongs to: numbered directories, and who may join one.

::

    runs/0001/bridge/                              what the jobs share, see ``agreement``
    runs/0001/bridge/donor/attempts/0001.json      each start of a job claims the next number
    runs/0001/donor, runs/0001/receiver            what each job writes for its user

``mkdir`` of the next number and the creation of a claim are exclusive, so any number of jobs may
start at the same moment, in any order. A run has one receiver; each donor has a name.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import socket
from pathlib import Path
from typing import Any

from toolkit.bridge import files
from toolkit.bridge.agreement import (
    agree,
    attempts_of,
    check_pair,
    claim_name,
    donors_of,
    has_ended,
    next_attempt,
    open_bridge,
    read_claim,
    to_json,
)
from toolkit.bridge.authentication import (
    UNSIGNED,
    Signer,
    make_bridge_directory,
    run_mode,
    warn_of_others,
)
from toolkit.bridge.class_names import agree_on_classes
from toolkit.bridge.config import BridgeConfig, Role
from toolkit.bridge.errors import BridgeError, OtherKeyError
from toolkit.bridge.liveness import BEAT_SECONDS, SILENT_BEATS, PeerWatch, some_heart_beats
from toolkit.bridge.own_weights import stream_of
from toolkit.bridge.transport import DirectoryTransport

logger = logging.getLogger(__name__)

CHECKPOINT_FILE = "gradient_bridge.json"
_NUMBER = re.compile(r"[0-9]{4,}")
_NAME = re.compile(r"\w[\w.-]*")


@dataclasses.dataclass(frozen=True, slots=True)
class Attachment:
    """A job's place in a run: the run's directory and id, and which start of the job this is."""

    run_dir: Path
    run_id: str
    attempt: int


def attach(
    role: Role,
    config: BridgeConfig,
    terms: dict[str, Any],
    claim: dict[str, Any],
    signer: Signer = UNSIGNED,
) -> Attachment:
    """Find the run for this start of a job, or found one, and claim the role in it.

    Args:
        role: ``donor`` or ``receiver``.
        config: names the runs directory and, maybe, a run or a checkpoint.
        terms: what jobs must agree on: ``agreement.TERMS``, and ``schemas``: that of the
            ``backbone`` and of each head that this job shares. And ``class_names`` by head, where
            this job states them.
        claim: what other jobs may want to know of this one; fit for JSON.
        signer: of this job.

    Raises:
        OtherKeyError: if the run to join has not this job's key.
        BridgeError: if a named run is over or its role is taken by a living job, the checkpoint
            is of no run in this directory, or the directory cannot be written.
        SchemaMismatchError: if the other job's terms differ.
        ClassMismatchError: if another job states other classes of a head.
    """
    runs_dir = Path(config.runs_dir).absolute()
    job = config.job_of(role)
    try:
        runs_dir.mkdir(parents=True, exist_ok=True)
        if signer.has_key:
            warn_of_others(runs_dir)
        while True:
            try:
                run_dir, attempt = _choose_run(runs_dir, role, job, config, signer)
                return _join(run_dir, role, job, terms, claim, attempt, signer)
            except _OvertakenError:
                continue  # another job was faster between our look and our claim: look again
    except OSError as error:
        raise BridgeError(
            f"cannot use the runs directory {runs_dir}: {error}. Give a directory that both jobs "
            "can write to (--runs_dir)"
        ) from error


def read_checkpoint(checkpoint: Path) -> dict[str, Any]:
    """What a bridge wrote into a checkpoint directory.

    Raises:
        BridgeError: if there is nothing of a bridge in it.
    """
    try:
        content: dict[str, Any] = json.loads((checkpoint / CHECKPOINT_FILE).read_bytes())
        missing = {"job", "run", "run_id"} - set(content)
        if missing:
            raise ValueError(f"{CHECKPOINT_FILE} lacks {sorted(missing)}")
    except (OSError, ValueError, TypeError) as error:
        raise BridgeError(
            f"{checkpoint} is no complete checkpoint of a bridged job: {error}. Give the directory "
            "of one checkpoint, such as runs/0001/receiver/step_100"
        ) from None
    return content


class _OvertakenError(Exception):
    """Another job took what this one was about to take."""


def _choose_run(
    runs_dir: Path, role: Role, job: str, config: BridgeConfig, signer: Signer
) -> tuple[Path, int]:
    """The run to join, and the number of this start of this job when the run was judged."""
    if config.resume_from_checkpoint is not None:
        checkpoint = Path(config.resume_from_checkpoint)
        run_dir = _run_of_checkpoint(runs_dir, job, checkpoint, signer)
    elif config.run is not None:
        run_dir = _named_run(runs_dir, config.run, signer)
    else:
        return _open_or_new_run(runs_dir, role, config, signer)
    transport = open_bridge(run_dir, signer)
    attempt = next_attempt(transport, job)
    if transport is not None:
        if config.run is not None:
            _refuse_over(transport, role, config)
        _refuse_living(transport, role, job)
    return run_dir, attempt


def _run_of_checkpoint(runs_dir: Path, job: str, checkpoint: Path, signer: Signer) -> Path:
    content = read_checkpoint(checkpoint)
    if content["job"] != job:
        raise BridgeError(f"{checkpoint} is a checkpoint of the {content['job']}, not the {job}")
    run_dir = _plain_name(runs_dir, str(content["run"]))
    transport = open_bridge(run_dir, signer)
    if transport is None or transport.signer.run_id != content["run_id"]:
        raise BridgeError(
            f"{checkpoint} belongs to run {content['run']} (id {content['run_id']}), which is not "
            f"in {runs_dir}; give the directory that holds it (--runs_dir)"
        )
    return run_dir


def _named_run(runs_dir: Path, name: str, signer: Signer) -> Path:
    run_dir = _plain_name(runs_dir, name)
    run_dir.mkdir(run_mode(signer), exist_ok=True)
    return run_dir


def _plain_name(runs_dir: Path, name: str) -> Path:
    if not _NAME.fullmatch(name):
        raise BridgeError(f"run name {name!r} must be a plain directory name")
    return runs_dir / name


def _refuse_over(transport: DirectoryTransport, role: Role, config: BridgeConfig) -> None:
    name = transport.root.parent.name
    ways_out = (
        "leave --run out to begin a new run, name another one, or resume it with "
        "--resume_from_checkpoint"
    )
    if has_ended(transport, "receiver"):
        raise BridgeError(f"run {name!r} is over: its receiver has ended; {ways_out}")
    donors = donors_of(transport) if role == "receiver" else []
    if _have_left_weights(transport, donors, config):
        return
    if donors and all(has_ended(transport, donor) for donor in donors):
        who = "its donor has" if len(donors) == 1 else "all its donors have"
        raise BridgeError(f"run {name!r} is over: {who} ended; {ways_out}")


def _refuse_living(transport: DirectoryTransport, role: Role, job: str) -> None:
    holder = read_claim(transport, job)
    if holder is not None and _lives(transport, job):
        another = "" if role == "receiver" else "give this one a name of its own (--donor_name), "
        raise BridgeError(
            f"run {transport.root.parent.name!r} has a living {job} (process {holder['pid']} on "
            f"{holder['host']}): end that one first, {another}name another run (--run), or leave "
            "--run and --resume_from_checkpoint out to begin a new run"
        )


def runs_in(runs_dir: Path) -> list[Path]:
    """The runs in a directory, in the order of their names; one that nobody has joined too."""
    found = (p for p in runs_dir.iterdir() if _NUMBER.fullmatch(p.name) or (p / "bridge").is_dir())
    return sorted(path for path in found if path.is_dir())


def newest_run(runs_dir: Path) -> str | None:
    """The name of the numbered run with the highest number, or None."""
    numbered = (path for path in runs_dir.glob("*") if _NUMBER.fullmatch(path.name))
    return max((path.name for path in numbered if path.is_dir()), key=int, default=None)


def _open_or_new_run(
    runs_dir: Path, role: Role, config: BridgeConfig, signer: Signer
) -> tuple[Path, int]:
    """The newest numbered run if it waits for this job, else a new one of the next number.

    And the number of this start of this job before the run was judged.
    """
    newest, job = newest_run(runs_dir), config.job_of(role)
    if newest is not None:
        try:
            transport = open_bridge(runs_dir / newest, signer)
            attempt = next_attempt(transport, job)
            if transport is None or _waits_for(transport, role, config):
                return runs_dir / newest, attempt
        except OtherKeyError:
            if _seems_to_wait_for(runs_dir / newest, job):
                raise
    # The number follows from the very look that found no run to join: of two jobs that start at
    # the same moment one makes the directory, and the other looks again and joins it.
    run_dir = runs_dir / f"{int(newest or 0) + 1:04d}"
    while run_dir.is_file():
        run_dir = runs_dir / f"{int(run_dir.name) + 1:04d}"
    try:
        run_dir.mkdir(run_mode(signer))
    except FileExistsError:
        raise _OvertakenError from None
    return run_dir, 1


def _waits_for(transport: DirectoryTransport, role: Role, config: BridgeConfig) -> bool:
    if has_ended(transport, "receiver"):
        return False
    job, has_receiver = config.job_of(role), bool(attempts_of(transport, "receiver"))
    # A receiver that lives on what a donor has left takes another one of that name.
    is_successor = role == "donor" and has_receiver and has_ended(transport, job)
    if attempts_of(transport, job) and (not is_successor or _lives(transport, job)):
        return False
    donors = donors_of(transport)
    peers = ["receiver"] if role == "donor" and has_receiver else donors
    if role == "receiver" and _have_left_weights(transport, donors, config):
        return True
    open_peers = [peer for peer in peers if not has_ended(transport, peer)]
    if peers and not any(_lives(transport, peer) for peer in open_peers):
        if open_peers:
            who, name = ", ".join(open_peers), transport.root.parent.name
            logger.info("run %s: %s does not live; not joining it", name, who)
        return False
    return True


def _seems_to_wait_for(run_dir: Path, job: str) -> bool:
    """Whether a run with another key has a living job and none with this name.

    What is in its files is not believed: the answer decides only whether this job says that the
    keys differ, or begins a run of its own beside one that is over or complete.
    """
    bridge = run_dir / "bridge"
    is_taken = any((bridge / job / "attempts").glob("*.json"))
    return not is_taken and some_heart_beats(bridge, SILENT_BEATS * BEAT_SECONDS)


def _have_left_weights(
    transport: DirectoryTransport, donors: list[str], config: BridgeConfig
) -> bool:
    """Whether this receiver can use what donors have trained by themselves, dead or alive."""
    return config.takes_left_weights and any(transport.sequences(stream_of(d)) for d in donors)


def _join(
    run_dir: Path,
    role: Role,
    job: str,
    terms: dict[str, Any],
    claim: dict[str, Any],
    attempt: int,
    signer: Signer,
) -> Attachment:
    """Agree on the terms, then claim this attempt."""
    bridge = run_dir / "bridge"
    make_bridge_directory(bridge, signer)
    run_id = agree(bridge, job, terms, signer)
    transport = DirectoryTransport(bridge, signer.of_run(run_id))
    agree_on_classes(transport.small, job, terms.get("class_names", {}))
    for name in (job, f"{job}/attempts"):
        files.make_directory(bridge / name)
    heads = sorted(set(terms["schemas"]) - {"backbone"})
    content = {**claim, "heads": heads, "host": socket.gethostname(), "pid": os.getpid()}
    claimed = claim_name(job, attempt)
    try:
        transport.small.create(claimed, to_json(content))
    except FileExistsError:
        raise _OvertakenError from None
    try:  # of two jobs that start at the same moment, the later one finds the other's claim
        for other in donors_of(transport) if role == "receiver" else ("receiver",):
            if (theirs := read_claim(transport, other)) is not None:
                pair = (other, theirs, content) if role == "receiver" else (job, content, theirs)
                check_pair(*pair)
    except BridgeError:
        (bridge / claimed).unlink()  # a corrected start must find its place free
        raise
    return Attachment(run_dir, run_id, attempt)


def _lives(transport: DirectoryTransport, job: str) -> bool:
    watch = PeerWatch(transport, job)
    return watch.await_life(SILENT_BEATS * BEAT_SECONDS)
