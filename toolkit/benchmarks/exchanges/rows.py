"""What ``recipes/benchmark.py exchanges`` compares: which jobs, with which flags."""

from __future__ import annotations

import dataclasses
from pathlib import Path

ALONE, SEED, LOCKSTEP, JOINT = "alone", "seed", "gradient-0", "joint"
PEER_WAIT_SECONDS = 5  # without a donor's sign of life


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One way to share, or not to.

    Attributes:
        name: what ``--rows`` calls it.
        title: what the table calls it.
        exchange: empty where no bridge joins two jobs.
        donor_flags: of this way.
        receiver_flags: of this way.
        late: receiver steps by which a donor's payloads come late.
        donor_first: whether the donor has ended when the receiver begins.
        donor_killed: whether the donor is killed when the receiver is half-way.
    """

    name: str
    title: str
    exchange: str = ""
    donor_flags: tuple[object, ...] = ()
    receiver_flags: tuple[object, ...] = ()
    late: int = 0
    donor_first: bool = False
    donor_killed: bool = False

    @property
    def shares(self) -> bool:
        """Whether anything crosses that is meant to."""
        return self.name not in (ALONE, JOINT)

    @property
    def trains_by_itself(self) -> bool:
        """Whether the donor does, which may then end before the receiver."""
        return self.exchange in ("head", "distill")

    @property
    def num_jobs(self) -> int:
        """How many run side by side."""
        return 2 if self.shares and not self.donor_first else 1


def _gradient(late: int, stale: str = "") -> Row:
    title = f"gradient, {late} steps late" if late else "gradient, lockstep"
    return Row(
        name=f"gradient-{late}-{stale}" if stale else f"gradient-{late}",
        title=f"{title}, {stale}" if stale else title,
        exchange="gradient",
        receiver_flags=("--max_staleness", late, *(("--stale", stale) if stale else ())),
        late=late,
    )


def _compressed(name: str, title: str, *flags: object) -> Row:
    return Row(
        name=f"gradient-{name}",
        title=f"gradient, {title}",
        exchange="gradient",
        donor_flags=("--compression", *flags),
    )


def _delta(local_steps: int) -> Row:
    flags = ("--local_steps", local_steps)
    return Row(
        name=f"delta-{local_steps}",
        title=f"delta, {local_steps} local steps",
        exchange="delta",
        donor_flags=flags,
        receiver_flags=flags,
    )


def _distill(publish_every: int) -> Row:
    return Row(
        name=f"distill-{publish_every}",
        title=f"distill, every {publish_every} steps",
        exchange="distill",
        donor_flags=("--publish_every", publish_every),
    )


_ROWS = (
    Row(name=ALONE, title="receiver alone"),
    Row(name=SEED, title="the seed's recipe"),
    Row(name="head", title="head", exchange="head", receiver_flags=("--init_h2", "donor")),
    *map(_gradient, (0, 1, 8, 32)),
    _gradient(32, "damp"),
    _compressed("bf16", "bf16", "bf16"),
    _compressed("topk", "top 1 %", "topk"),
    *map(_delta, (8, 32, 128)),
    *map(_distill, (25, 100)),
    Row(
        name="distill-end",
        title="distill, donor finished before",
        exchange="distill",
        donor_flags=("--publish_every", 10**9),
        donor_first=True,
    ),
    Row(
        name="auto-killed",
        title="auto, donor killed half-way",
        exchange="auto",
        donor_killed=True,
    ),
    Row(name=JOINT, title="joint training"),
)
ROWS = {row.name: row for row in _ROWS}


@dataclasses.dataclass(frozen=True, slots=True)
class Command:
    """One job: the recipe's name or the path of a script, its flags, where it writes."""

    recipe: str | Path
    output_dir: Path
    flags: tuple[object, ...]


def commands(
    row: Row, directory: Path, training: tuple[object, ...], steps: tuple[object, ...]
) -> dict[str, Command]:
    """The jobs of a row, by role; the last one is measured.

    Args:
        row: which.
        directory: of this row and seed.
        training: flags of all jobs: the task, the seed and so on.
        steps: flags that say how long to train. A donor that follows the receiver goes without,
            until that has ended; one that trains by itself takes as many steps as it.
    """
    scripts = Path(__file__).resolve().parent

    def command(role: str, recipe: str | Path, *flags: object) -> Command:
        output_dir = directory / role
        return Command(recipe, output_dir, (*flags, *training, "--output_dir", output_dir))

    if row.name == JOINT:
        return {"joint": command("joint", "joint", *steps)}
    if row.name == SEED:
        script, file = scripts / "seed_recipe.py", ("--file", directory / "h2.pt")
        return {role: command(role, script, role, *file, *steps) for role in ("donor", "receiver")}
    bridge: tuple[object, ...] = ("--runs_dir", directory.parent, "--run", directory.name)
    if row.name == ALONE:
        return {"receiver": command("receiver", "receiver", *bridge, *steps, "--peer_wait", 1)}
    bridge = (*bridge, "--exchange", row.exchange)
    if row.donor_killed:
        bridge = (*bridge, "--peer_wait", PEER_WAIT_SECONDS)
    elif not row.trains_by_itself:
        bridge = (*bridge, "--require_peer")
    donor: tuple[str | Path, ...] = ("donor",)
    if row.late:
        donor = (scripts / "late_donor.py", str(row.late))
    donor_steps = steps if row.trains_by_itself else ()
    return {
        "donor": command("donor", *donor, *bridge, *donor_steps, *row.donor_flags),
        "receiver": command("receiver", "receiver", *bridge, *steps, *row.receiver_flags),
    }
