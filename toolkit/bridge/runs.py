"""Which run a job belongs to: numbered directories, and who may join one.

::

    runs/0001/bridge/run.json                      what both jobs agreed on; the first one wrote it
    runs/0001/bridge/donor/attempts/0001.json      each start of a job claims the next number
    runs/0001/donor, runs/0001/receiver            what each job writes for its user

``mkdir`` of the next number and the creation of ``run.json`` and of a claim are exclusive, so any
number of jobs may start at the same moment, in any order.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
import re
import socket
import uuid
from pathlib import Path
from typing import Any

from toolkit.bridge import files
from toolkit.bridge.config import PEER, BridgeConfig, Role
from toolkit.bridge.errors import BridgeError, PayloadError, SchemaMismatchError
from toolkit.bridge.liveness import BEAT_SECONDS, PeerWatch
from toolkit.bridge.payload import FORMAT_VERSION, read_header
from toolkit.bridge.transport import DirectoryTransport
from toolkit.parameters import schema_differences

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
    role: Role, config: BridgeConfig, terms: dict[str, Any], claim: dict[str, Any]
) -> Attachment:
    """Find the run for this start of a job, or found one, and claim the role in it.

    Args:
        role: ``donor`` or ``receiver``.
        config: names the runs directory and, maybe, a run or a checkpoint.
        terms: what both jobs must agree on: ``schema``, ``scope``, ``unit``.
        claim: what the other job may want to know of this one; fit for JSON.

    Raises:
        BridgeError: if a named run is over or its role is taken by a living job, the checkpoint
            is of no run in this directory, or the directory cannot be written.
        SchemaMismatchError: if the other job's terms differ.
    """
    runs_dir = Path(config.runs_dir).absolute()
    try:
        runs_dir.mkdir(parents=True, exist_ok=True)
        while True:
            try:
                run_dir, attempts = _choose_run(runs_dir, role, config)
                return _join(run_dir, role, terms, claim, attempts + 1)
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
        missing = {"role", "run", "run_id"} - set(content)
        if missing:
            raise ValueError(f"{CHECKPOINT_FILE} lacks {sorted(missing)}")
    except (OSError, ValueError, TypeError) as error:
        raise BridgeError(
            f"{checkpoint} is no complete checkpoint of a bridged job: {error}. Give the directory "
            "of one checkpoint, such as runs/0001/receiver/step_100"
        ) from None
    return content


def has_ended(run_dir: Path, job: Role) -> bool:
    """Whether the newest record of ``job`` is its ``end``."""
    transport = DirectoryTransport(run_dir / "bridge")
    for sequence in reversed(transport.sequences(job)):
        try:
            header = read_header(functools.partial(transport.read_head, job, sequence))
            return header.kind == "end"
        except (FileNotFoundError, PayloadError):
            continue
    return False


class _OvertakenError(Exception):
    """Another job took what this one was about to take."""


def _choose_run(runs_dir: Path, role: Role, config: BridgeConfig) -> tuple[Path, int]:
    """The run to join, and how many starts of this role it had when it was judged."""
    if config.resume_from_checkpoint is not None:
        run_dir = _run_of_checkpoint(runs_dir, role, Path(config.resume_from_checkpoint))
    elif config.run is not None:
        run_dir = _named_run(runs_dir, config.run)
    else:
        return _open_or_new_run(runs_dir, role), 0
    attempts = len(_attempts(run_dir, role))
    if config.run is not None:
        _refuse_over(run_dir, role)
    _refuse_living(run_dir, role)
    return run_dir, attempts


def _run_of_checkpoint(runs_dir: Path, role: Role, checkpoint: Path) -> Path:
    content = read_checkpoint(checkpoint)
    if content["role"] != role:
        raise BridgeError(f"{checkpoint} is a checkpoint of the {content['role']}, not the {role}")
    run_dir = runs_dir / content["run"]
    try:
        run_id = json.loads((run_dir / "bridge" / "run.json").read_bytes())["run_id"]
    except FileNotFoundError:
        run_id = None
    if run_id != content["run_id"]:
        raise BridgeError(
            f"{checkpoint} belongs to run {content['run']} (id {content['run_id']}), which is not "
            f"in {runs_dir}; give the directory that holds it (--runs_dir)"
        )
    return run_dir


def _named_run(runs_dir: Path, name: str) -> Path:
    if not _NAME.fullmatch(name):
        raise BridgeError(f"run name {name!r} must be a plain directory name")
    run_dir = runs_dir / name
    run_dir.mkdir(exist_ok=True)
    return run_dir


def _refuse_over(run_dir: Path, role: Role) -> None:
    name = run_dir.name
    ways_out = (
        "leave --run out to begin a new run, name another one, or resume it with "
        "--resume_from_checkpoint"
    )
    if has_ended(run_dir, "receiver"):
        raise BridgeError(f"run {name!r} is over: its receiver has ended; {ways_out}")
    if role == "receiver" and has_ended(run_dir, "donor"):
        raise BridgeError(f"run {name!r} is over: its donor has ended; {ways_out}")


def _refuse_living(run_dir: Path, role: Role) -> None:
    attempts = _attempts(run_dir, role)
    if attempts and _lives(run_dir, role):
        holder = json.loads(attempts[-1].read_bytes())
        raise BridgeError(
            f"run {run_dir.name!r} has a living {role} (process {holder['pid']} on "
            f"{holder['host']}): end that one first, name another run (--run), or leave --run and "
            "--resume_from_checkpoint out to begin a new run"
        )


def newest_run(runs_dir: Path) -> str | None:
    """The name of the numbered run with the highest number, or None."""
    numbered = (path for path in runs_dir.glob("*") if _NUMBER.fullmatch(path.name))
    return max((path.name for path in numbered if path.is_dir()), key=int, default=None)


def newest_attempt(run_dir: Path, role: Role) -> int:
    """The number of the newest start of a job; 0 if there was none."""
    return max((int(path.stem) for path in _attempts(run_dir, role)), default=0)


def _open_or_new_run(runs_dir: Path, role: Role) -> Path:
    """The newest numbered run if it waits for this role, else a new one of the next number."""
    newest = newest_run(runs_dir)
    if newest is not None and _waits_for(runs_dir / newest, role):
        return runs_dir / newest
    # The number follows from the very look that found no run to join: of two jobs that start at
    # the same moment one makes the directory, and the other looks again and joins it.
    run_dir = runs_dir / f"{int(newest or 0) + 1:04d}"
    while run_dir.is_file():
        run_dir = runs_dir / f"{int(run_dir.name) + 1:04d}"
    try:
        run_dir.mkdir()
    except FileExistsError:
        raise _OvertakenError from None
    return run_dir


def _waits_for(run_dir: Path, role: Role) -> bool:
    if _attempts(run_dir, role) or has_ended(run_dir, "receiver") or has_ended(run_dir, "donor"):
        return False
    peer = PEER[role]
    if _attempts(run_dir, peer) and not _lives(run_dir, peer):
        logger.info("run %s has a %s that does not live; not joining it", run_dir.name, peer)
        return False
    return True


def _join(
    run_dir: Path, role: Role, terms: dict[str, Any], claim: dict[str, Any], attempt: int
) -> Attachment:
    """Agree on the terms, then claim this attempt."""
    bridge = run_dir / "bridge"
    (bridge / role / "attempts").mkdir(parents=True, exist_ok=True)
    run_id = _agree(bridge, role, terms)
    content = {**claim, "host": socket.gethostname(), "pid": os.getpid()}
    claimed = bridge / role / "attempts" / f"{attempt:04d}.json"
    try:
        _create_json(claimed, content)
    except FileExistsError:
        raise _OvertakenError from None
    if others := _attempts(run_dir, PEER[role]):
        try:
            _check_budget({role: content, PEER[role]: json.loads(others[-1].read_bytes())})
        except BridgeError:
            claimed.unlink()  # a corrected start must find its place free
            raise
    return Attachment(run_dir, run_id, attempt)


def _agree(bridge: Path, role: Role, terms: dict[str, Any]) -> str:
    path = bridge / "run.json"
    mine = {"run_id": uuid.uuid4().hex, "format_version": FORMAT_VERSION, "founder": role, **terms}
    try:
        _create_json(path, mine)
        return str(mine["run_id"])
    except FileExistsError:
        theirs = json.loads(path.read_bytes())
    founder = theirs["founder"] if theirs["founder"] != role else f"earlier {role}"
    differences = [
        f"{key}: {role} {mine[key]!r}, {founder} {theirs[key]!r}"
        for key in ("format_version", "scope", "unit")
        if mine[key] != theirs[key]
    ]
    differences += schema_differences(mine["schema"], theirs["schema"], role, founder)
    if differences:
        raise SchemaMismatchError(
            f"this {role} does not fit run {bridge.parent.name}, founded by the {founder}; these "
            "differ:\n  " + "\n  ".join(differences) + "\nBoth jobs must share the backbone and "
            "the donor's head exactly. Give both the same model settings, or begin another run "
            "(--run NAME, or another --runs_dir)"
        )
    return str(theirs["run_id"])


def _check_budget(claims: dict[Role, dict[str, Any]]) -> None:
    """Refuse a donor's budget that cannot hold what the receiver's checkpoints may ask for."""
    donor, receiver = claims["donor"], claims["receiver"]
    interval = receiver["checkpoint_interval"]
    if interval is None:
        return
    kept = receiver["checkpoints_kept"] or 1
    payloads = interval * (kept + 1)
    for have, need, flag in (
        (donor["payload_budget_files"], payloads, "--payload_budget_files"),
        (
            donor["payload_budget_gib"],
            payloads * donor["payload_bytes"] / 2**30,
            "--payload_budget_gib",
        ),
    ):
        if need > have:
            raise BridgeError(
                f"the donor may keep {have:g} ({flag}), but a receiver that checkpoints every "
                f"{interval} steps and keeps {kept} of them can ask for {need:.3g}: raise {flag} "
                "on the donor, or checkpoint more often or keep fewer (--checkpointing_steps, "
                "--checkpoints_total_limit) on the receiver"
            )


def _attempts(run_dir: Path, role: Role) -> list[Path]:
    claims = (run_dir / "bridge" / role / "attempts").glob("*.json")
    return sorted(
        (path for path in claims if _NUMBER.fullmatch(path.stem)), key=lambda path: int(path.stem)
    )


def _lives(run_dir: Path, role: Role) -> bool:
    watch = PeerWatch(DirectoryTransport(run_dir / "bridge"), role)
    return watch.await_life(5 * BEAT_SECONDS)


def _create_json(path: Path, content: dict[str, Any]) -> None:
    data = json.dumps(content, indent=1, sort_keys=True).encode()
    files.create(path, lambda temporary: temporary.write_bytes(data))
