"""Pairs of launched recipes on disks and clocks that fail when a test says so."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from torch import Tensor

from tests.launching import Job, Launcher
from tests.oracle import largest_difference
from tests.recipes.running import DONOR, RECEIVER, TIMEOUT, Recipes, wait_until

DISTURBED_RECIPE = Path(__file__).with_name("disturbed_recipe.py")
ROOT = DISTURBED_RECIPE.parents[2]
NUM_STEPS = 300
LOCKSTEP: tuple[object, ...] = ("--exchange", "gradient")

Role = Literal["donor", "receiver"]
RECIPE: dict[Role, str] = {"donor": DONOR, "receiver": RECEIVER}


class FaultyRecipes(Recipes):
    """Launches recipes whose disk and clock a test can disturb, by role."""

    def faults(self, role: Role) -> Path:
        """Where :mod:`tests.faults.disturbed_recipe` is told what shall fail."""
        path = self.cwd / f"faults of the {role}"
        path.mkdir(exist_ok=True)
        return path

    def start(
        self,
        role: Role,
        *flags: object,
        num_processes: int = 1,
        env: Mapping[str, str] | None = None,
        options: Sequence[object] = (),
        log: Path | None = None,
    ) -> Job:
        """Launch one side of a run of ``NUM_STEPS`` steps in lockstep; see ``launch``."""
        common = ["--dtype", "float64", "--eval_steps", "1000", *LOCKSTEP]
        if role == "receiver":
            common += ["--max_train_steps", NUM_STEPS]
        return self._launcher(
            DISTURBED_RECIPE, self.faults(role), ROOT / RECIPE[role], *common, *flags,
            num_processes=num_processes, env=env, cwd=self.cwd, log=log, options=options,
        )  # fmt: skip

    def disturb(self, role: Role, what: str) -> None:
        """From now on the role's disk fails so."""
        temporary = self.faults(role) / "next"
        temporary.write_text(what)
        temporary.replace(self.faults(role) / "disk")

    def mend(self, role: Role) -> None:
        """From now on the role's disk works."""
        (self.faults(role) / "disk").unlink()

    def set_clock(self, role: Role, offset: float) -> None:
        """From now on the role's wall clock is off by so many seconds."""
        temporary = self.faults(role) / "next"
        temporary.write_text(str(offset))
        temporary.replace(self.faults(role) / "clock")

    def num_failed(self, role: Role) -> int:
        """How many of the role's calls have failed."""
        calls = self.faults(role) / "calls"
        return len(calls.read_text().splitlines()) if calls.exists() else 0

    def await_payload(self, number: int, run: str = "0001") -> None:
        """Wait until the donor has published so many."""
        records = self.path(run, "bridge", "donor", "records")
        wait_until(records.exists, "the donor")

        def is_there() -> bool:
            numbers = (name.partition(".")[0] for name in os.listdir(records))
            return any(int(n) >= number for n in numbers if n.isdigit())

        wait_until(is_there, f"payload {number}")

    def check_ledger(self, run: str = "0001") -> dict[str, int]:
        """That every payload has one fate; how many have which."""
        fates: dict[str, int] = self.results(run, "receiver")["fates"]
        settled = sum(fates[fate] for fate in ("applied", "dropped", "rejected", "skipped"))
        assert settled + fates["pending"] == fates["published"]
        return fates


def await_output(job: Job, text: str) -> None:
    """Wait until a job has said something."""
    wait_until(lambda: text in job.output(), text)


def await_end(job: Job) -> None:
    """Wait until no process of a job is left, the launcher's children included."""
    wait_until(lambda: not job.processes(), "the end of all its processes")


def undisturbed_weights(directory: Path) -> dict[str, Tensor]:
    """The receiver's weights after a run that nothing disturbs."""
    with Launcher(directory) as launcher:
        recipes = FaultyRecipes(launcher, directory)
        for job in [recipes.start("donor"), recipes.start("receiver")]:
            job.wait(TIMEOUT)
    return recipes.weights("0001", "receiver")


def check_undisturbed(recipes: FaultyRecipes, undisturbed: dict[str, Tensor]) -> None:
    """The run ended as if nothing had been."""
    assert largest_difference(recipes.weights("0001", "receiver"), undisturbed) == 0.0
    fates = recipes.check_ledger()
    assert fates["applied"] == NUM_STEPS
    assert (fates["dropped"], fates["rejected"], fates["skipped"]) == (0, 0, 0)
    results = recipes.results("0001", "receiver")
    assert results["steps_alone"] == results["steps_taught"] == 0
