"""What the jobs of a run say of themselves, and whether they fit together.

::

    runs/0001/bridge/run.json                      what all jobs agreed on; the first one wrote it
    runs/0001/bridge/heads/heads.h2.json           the same for each head
    runs/0001/bridge/heads/heads.h2.classes        the names of its classes, see ``class_names``
    runs/0001/bridge/donor/attempts/0001.json      what a start of a job says of itself: its claim

Each of these files is created once, by one job, and never replaced. With a key all are signed:
``run.json`` for itself, as it has the run's id, the others for this run.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from toolkit.bridge import files
from toolkit.bridge.authentication import KEY_SOURCES, Signer
from toolkit.bridge.errors import (
    BridgeError,
    OtherKeyError,
    PayloadError,
    SchemaMismatchError,
)
from toolkit.bridge.payload import FORMAT_VERSION
from toolkit.bridge.signed_files import SignedFiles
from toolkit.bridge.transport import DirectoryTransport
from toolkit.parameters import schema_differences

TERMS = ("exchange", "local_steps", "scope", "unit")
_LISTED = 20
_ATTEMPT = re.compile(r"[0-9]{4}|[1-9][0-9]{4,}")


def open_bridge(run_dir: Path, signer: Signer) -> DirectoryTransport | None:
    """The transport of a run; None for one that nobody has founded yet.

    Raises:
        OtherKeyError: if it was founded with another key, or with one where this job has none.
        BridgeError: if its founder wrote something else.
    """
    found = _read(SignedFiles(run_dir / "bridge", signer), "run.json")
    if found is None:
        return None
    if not isinstance(found.get("run_id"), str):
        raise BridgeError(f"{run_dir} is no run of the bridge: run.json has no run_id")
    return DirectoryTransport(run_dir / "bridge", signer.of_run(found["run_id"]))


def donors_of(transport: DirectoryTransport) -> list[str]:
    """The names of a run's donors, in order."""
    names = {path.parent.name for path in transport.root.glob("*/attempts")} - {"receiver"}
    return sorted(name for name in names if attempts_of(transport, name))


def read_claim(transport: DirectoryTransport, job: str) -> dict[str, Any] | None:
    """What the newest start of a job says of itself; None if there was none."""
    for number in reversed(_numbers(transport, job)):
        content = transport.small.read(claim_name(job, number))
        if content is not None:  # not one of a start that was refused meanwhile, or a forged one
            return dict(json.loads(content))
    return None


def attempts_of(transport: DirectoryTransport, job: str) -> list[int]:
    """The numbers of all starts of a job, ascending."""
    numbers = _numbers(transport, job)
    if not transport.signer.has_key:
        return numbers
    return [n for n in numbers if transport.small.read(claim_name(job, n)) is not None]


def next_attempt(transport: DirectoryTransport | None, job: str) -> int:
    """The number that the next start of a job has to claim.

    Args:
        transport: of the run; None if it is not founded yet.
        job: its name.
    """
    if transport is None:
        return 1
    number = max(attempts_of(transport, job), default=0) + 1
    taken = set(_numbers(transport, job))
    # A file that is no claim of this run may be in the way of one.
    while number in taken and transport.small.read(claim_name(job, number)) is None:
        number += 1
    return number


def claim_name(job: str, attempt: int) -> str:
    """The name of a claim below the run's bridge directory."""
    return f"{job}/attempts/{attempt:04d}.json"


def has_ended(transport: DirectoryTransport, job: str) -> bool:
    """Whether the newest record of a job is its ``end``."""
    for sequence in reversed(transport.sequences(job)):
        try:
            return transport.read_header(job, sequence).kind == "end"
        except (FileNotFoundError, PayloadError):
            continue
    return False


def _numbers(transport: DirectoryTransport, job: str) -> list[int]:
    names = (path.stem for path in (transport.root / job / "attempts").glob("*.json"))
    return sorted(int(name) for name in names if _ATTEMPT.fullmatch(name))


def agree(bridge: Path, job: str, terms: dict[str, Any], signer: Signer) -> str:
    """Found the run, or fit what its founder wrote.

    Args:
        bridge: the run's directory of shared files.
        job: the name of this job.
        terms: as :func:`toolkit.bridge.runs.attach` has them.
        signer: of this job.

    Returns:
        The run's id.

    Raises:
        SchemaMismatchError: naming each term and each tensor that differs.
        OtherKeyError: if it was founded with another key.
    """
    schemas = dict(terms["schemas"])
    mine: dict[str, Any] = {"run_id": uuid.uuid4().hex, "founder": job}
    mine |= {"format_version": FORMAT_VERSION, "schema": schemas.pop("backbone")}
    mine |= {key: terms[key] for key in TERMS}
    found = create_or_read(SignedFiles(bridge, signer), "run.json", mine)
    founder = found["founder"] if found["founder"] != job else f"earlier {job}"
    differences = [
        f"{key}: {job} {mine[key]!r}, {founder} {found.get(key)!r}"
        for key in ("format_version", *TERMS)
        if mine[key] != found.get(key)
    ]
    differences += schema_differences(mine["schema"], found["schema"], job, founder)
    names = {head: f"heads/{head}.json" for head in schemas}
    known = [head for head, name in names.items() if (bridge / name).exists()]
    files.make_directory(bridge / "heads")
    small = SignedFiles(bridge, signer.of_run(str(found["run_id"])))
    for head in (*known, *schemas):
        if head in known or not differences:  # a job that does not fit founds nothing
            theirs = create_or_read(small, names[head], {"founder": job, "schema": schemas[head]})
            name = theirs["founder"] if theirs["founder"] != job else f"earlier {job}"
            lines = schema_differences(schemas[head], theirs["schema"], job, name)
            differences += [line for line in lines if line not in differences]
    if differences:
        frozen = (
            " What is frozen of the backbone must be so in all jobs, with the same values (both "
            "with their SHA-256 above); BridgeConfig(frozen='cross') in all of them lets it cross"
        )
        hint = frozen if any(" frozen at " in line for line in differences) else ""
        raise SchemaMismatchError(
            f"this {job} does not fit run {bridge.parent.name}, founded by the {founder}; these "
            f"differ:{in_lines(differences)}\nAll jobs must share the backbone, and "
            "those with the same head that head, exactly. Give them the same model settings, or "
            f"begin another run (--run NAME, or another --runs_dir).{hint}"
        )
    return str(found["run_id"])


def in_lines(differences: Sequence[str]) -> str:
    """Lines below a message: the first 20 differences, and how many more there are."""
    more = len(differences) - _LISTED
    lines = [*differences[:_LISTED], *([f"and {more} more"] if more > 0 else [])]
    return "".join(f"\n  {line}" for line in lines)


def create_or_read(small: SignedFiles, name: str, mine: dict[str, Any]) -> dict[str, Any]:
    """What the file holds: mine, if this job is the first to write it."""
    try:
        small.create(name, to_json(mine))
        return mine
    except FileExistsError:
        found = _read(small, name)
        if found is None:
            raise FileNotFoundError(f"{small.root / name} is there, but cannot be found") from None
        return found


def _read(small: SignedFiles, name: str) -> dict[str, Any] | None:
    """What a founder wrote: no run is joined whose founder is not believed."""
    run_dir = small.root.parent
    try:
        content = small.signer.unseal(name, files.read_plain(small.root / name))
        return dict(json.loads(content))
    except FileNotFoundError:
        return None
    except PayloadError as error:
        if error.reason != "unauthenticated":
            raise BridgeError(f"{small.root / name}: {error}") from None
        raise OtherKeyError(
            f"run {run_dir.name!r} has another key than this job ({name}: {error.detail}). Give "
            f"all jobs of a run the same key, by {KEY_SOURCES}, or none of them one; or begin "
            "another run (--run NAME, or another --runs_dir)"
        ) from None
    except (ValueError, TypeError, RecursionError) as error:
        raise BridgeError(f"{run_dir} is no run of the bridge: {name}: {error}") from None


def check_pair(name: str, donor: dict[str, Any], receiver: dict[str, Any]) -> None:
    """Refuse a donor whose head or budget does not fit the receiver.

    A budget must hold what the receiver's checkpoints may ask for.

    Args:
        name: of the donor.
        donor: its claim.
        receiver: the receiver's claim.

    Raises:
        SchemaMismatchError: if the receiver does not have the donor's head.
        BridgeError: if the budget is too small.
    """
    if foreign := sorted(set(donor["heads"]) - set(receiver["heads"])):
        raise SchemaMismatchError(
            f"the donor {name!r} gives gradients for {foreign[0]!r}, the receiver takes those for "
            f"{', '.join(receiver['heads'])}: give the receiver all heads that its donors train"
        )
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


def to_json(content: dict[str, Any]) -> bytes:
    """What a file of this kind holds."""
    return json.dumps(content, indent=1, sort_keys=True).encode()
