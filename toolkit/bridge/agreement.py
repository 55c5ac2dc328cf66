"""What the jobs of a run say of themselves, and whether they fit together.

::

    runs/0001/bridge/run.json                      what all jobs agreed on; the first one wrote it
    runs/0001/bridge/heads/heads.h2.json           the same for each head
    runs/0001/bridge/donor/attempts/0001.json      what a start of a job says of itself: its claim

Each of these files is created once, by one job, and never replaced.
"""

from __future__ import annotations

import contextlib
import json
import re
import uuid
from pathlib import Path
from typing import Any

from toolkit.bridge import files
from toolkit.bridge.errors import BridgeError, SchemaMismatchError
from toolkit.bridge.payload import FORMAT_VERSION
from toolkit.parameters import schema_differences

TERMS = ("exchange", "local_steps", "scope", "unit")
ATTEMPT = re.compile(r"[0-9]{4,}")


def donors_of(run_dir: Path) -> list[str]:
    """The names of a run's donors, in order."""
    claims = (run_dir / "bridge").glob("*/attempts/*.json")
    return sorted({path.parent.parent.name for path in claims} - {"receiver"})


def read_claim(run_dir: Path, job: str) -> dict[str, Any] | None:
    """What the newest start of a job says of itself; None if there was none."""
    for path in reversed(attempts_of(run_dir, job)):
        with contextlib.suppress(FileNotFoundError):  # of a start that was refused meanwhile
            return dict(json.loads(path.read_bytes()))
    return None


def newest_attempt(run_dir: Path, job: str) -> int:
    """The number of the newest start of a job; 0 if there was none."""
    return max((int(path.stem) for path in attempts_of(run_dir, job)), default=0)


def attempts_of(run_dir: Path, job: str) -> list[Path]:
    """The claims of all starts of a job, in their order."""
    claims = (run_dir / "bridge" / job / "attempts").glob("*.json")
    return sorted(
        (path for path in claims if ATTEMPT.fullmatch(path.stem)), key=lambda path: int(path.stem)
    )


def agree(bridge: Path, job: str, terms: dict[str, Any]) -> str:
    """Found the run, or fit what its founder wrote.

    Args:
        bridge: the run's directory of shared files.
        job: the name of this job.
        terms: as :func:`toolkit.bridge.runs.attach` has them.

    Returns:
        The run's id.

    Raises:
        SchemaMismatchError: naming each term and each tensor that differs.
    """
    schemas = dict(terms["schemas"])
    mine: dict[str, Any] = {"run_id": uuid.uuid4().hex, "founder": job}
    mine |= {"format_version": FORMAT_VERSION, "schema": schemas.pop("backbone")}
    mine |= {key: terms[key] for key in TERMS}
    found = _create_or_read(bridge / "run.json", mine)
    founder = found["founder"] if found["founder"] != job else f"earlier {job}"
    differences = [
        f"{key}: {job} {mine[key]!r}, {founder} {found.get(key)!r}"
        for key in ("format_version", *TERMS)
        if mine[key] != found.get(key)
    ]
    differences += schema_differences(mine["schema"], found["schema"], job, founder)
    paths = {head: bridge / "heads" / f"{head}.json" for head in schemas}
    known = [head for head, path in paths.items() if path.exists()]
    (bridge / "heads").mkdir(exist_ok=True)
    for head in (*known, *schemas):
        if head in known or not differences:  # a job that does not fit founds nothing
            theirs = _create_or_read(paths[head], {"founder": job, "schema": schemas[head]})
            name = theirs["founder"] if theirs["founder"] != job else f"earlier {job}"
            lines = schema_differences(schemas[head], theirs["schema"], job, name)
            differences += [line for line in lines if line not in differences]
    if differences:
        raise SchemaMismatchError(
            f"this {job} does not fit run {bridge.parent.name}, founded by the {founder}; these "
            "differ:\n  " + "\n  ".join(differences) + "\nAll jobs must share the backbone, and "
            "those with the same head that head, exactly. Give them the same model settings, or "
            "begin another run (--run NAME, or another --runs_dir)"
        )
    return str(found["run_id"])


def _create_or_read(path: Path, mine: dict[str, Any]) -> dict[str, Any]:
    """What the file holds: mine, if this job is the first to write it."""
    try:
        create_json(path, mine)
        return mine
    except FileExistsError:
        return dict(json.loads(path.read_bytes()))


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


def create_json(path: Path, content: dict[str, Any]) -> None:
    """Create a file.

    Raises:
        FileExistsError: if it is there.
    """
    data = json.dumps(content, indent=1, sort_keys=True).encode()
    files.create(path, lambda temporary: temporary.write_bytes(data))
