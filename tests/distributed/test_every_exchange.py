"""Every exchange on two ranks of each job in bf16, killed half-way on both sides and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from tests.launching import Job, Launcher
from tests.oracle import largest_difference
from tests.recipes.running import DONOR, RECEIVER, ROOT, TIMEOUT, Recipes, wait_until

pytestmark = pytest.mark.slow

EVERY_RANK = ROOT / "tests" / "jobs" / "every_rank_recipe.py"
NUM_STEPS, INTERVAL, LOCAL_STEPS = 400, 40, 8
CHECKPOINTS = ("--checkpointing_steps", INTERVAL, "--checkpoints_total_limit", 2)
RESUME = ("--resume_from_checkpoint", "latest")

# Both jobs wait for each other in these: nothing depends on which of them is faster. While both
# live, "auto" is "gradient".
LOCKSTEP = {"gradient": "gradient", "auto": "gradient", "delta": "delta"}
SGD = ("--optimizer", "SGD", "--learning_rate", 0.05)


class Pair:
    """A donor and a receiver in a directory of their own."""

    def __init__(
        self, launcher: Launcher, directory: Path, exchange: str, *donor_flags: object
    ) -> None:
        self._launcher, self.directory, self.exchange = launcher, directory, exchange
        self._donor_flags = donor_flags
        self.recipes = Recipes(launcher, directory)

    def start(self, recipe: str, *flags: object) -> Job:
        """Launch a job on two ranks."""
        common: list[object] = ["--dtype", "float32", "--mixed_precision", "bf16"]
        common += ["--report_to", "none", "--eval_steps", 1000, "--exchange", self.exchange]
        if self.exchange == "delta":
            common += ["--local_steps", LOCAL_STEPS]
        return self._launcher(
            EVERY_RANK, ROOT / recipe, self.directory / "ranks", *common, *CHECKPOINTS, *flags,
            num_processes=2, cwd=self.directory,
        )  # fmt: skip

    def start_both(self, num_steps: int, *flags: object) -> list[Job]:
        """Launch both jobs; the donor is the first."""
        receiver = self.start(RECEIVER, "--max_train_steps", num_steps, *flags)
        return [self.start(DONOR, *self._donor_flags, *flags), receiver]

    def train(self, num_steps: int, *flags: object) -> None:
        """Launch both jobs and wait for their end."""
        for job in self.start_both(num_steps, *flags):
            job.wait(TIMEOUT)

    def weights(self, role: str = "receiver", rank: int = 0) -> dict[str, Tensor]:
        """What a rank has in the end."""
        return load_file(self.directory / "ranks" / f"{role}-{rank}.safetensors")

    def results(self, role: str = "receiver") -> dict[str, Any]:
        """What the job says of itself."""
        return self.recipes.results("0001", role)


class Undisturbed:
    """The receiver's weights of runs that nobody disturbs, each trained when first asked for."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._weights: dict[tuple[object, ...], dict[str, Tensor]] = {}

    def __call__(self, exchange: str, *donor_flags: object) -> dict[str, Tensor]:
        key = (exchange, *donor_flags)
        if key not in self._weights:
            directory = self._directory / str(len(self._weights))
            directory.mkdir()
            with Launcher(directory) as launcher:
                pair = Pair(launcher, directory, exchange, *donor_flags)
                pair.train(NUM_STEPS)
            self._weights[key] = pair.weights()
        return self._weights[key]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """What a resumed run is compared with."""
    return Undisturbed(tmp_path_factory.mktemp("undisturbed"))


# A donor's optimizer goes on from its own checkpoint, but its published rounds may be newer. One
# with moments has others then than it had, so that "delta" is bitwise the same without them only.
CASES = [
    pytest.param("gradient", (), True, id="gradient"),
    pytest.param("auto", (), True, id="auto"),
    pytest.param("delta", SGD, True, id="delta"),
    pytest.param("delta", (), False, id="delta, a donor with moments"),
    pytest.param("distill", (), False, id="distill"),
    pytest.param("head", (), False, id="head"),
]


@pytest.mark.parametrize(("exchange", "donor_flags", "is_exact"), CASES)
def test_that_both_jobs_go_on_where_they_were(
    launcher: Launcher, tmp_path: Path, undisturbed: Undisturbed,
    exchange: str, donor_flags: tuple[object, ...], is_exact: bool,
) -> None:  # fmt: skip
    pair = Pair(launcher, tmp_path, exchange, *donor_flags)
    donor, receiver = pair.start_both(NUM_STEPS)
    step = f"step_{2 * INTERVAL}"
    wait_until(pair.recipes.path("0001", "receiver", step).exists, "two checkpoints")
    wait_until(lambda: list(pair.recipes.path("0001", "donor").glob("step_*")), "the donor's")
    receiver.kill()
    donor.kill()
    assert not pair.recipes.path("0001", "receiver", "results.json").exists(), "killed too late"
    jobs = pair.start_both(NUM_STEPS, *RESUME)
    for job in jobs:
        job.wait(TIMEOUT)
        assert "resumed from" in job.output()
        assert "Traceback" not in job.output()
    assert [path.name for path in pair.recipes.path().iterdir()] == ["0001"]

    results = pair.results()
    assert results["num_processes"] == pair.results("donor")["num_processes"] == 2
    assert results["completed_steps"] == NUM_STEPS
    fates = results["fates"]
    settled = sum(fates[fate] for fate in ("applied", "dropped", "rejected", "skipped"))
    assert settled + fates["pending"] == fates["published"]
    given = fates["applied"] * (LOCAL_STEPS if exchange == "delta" else 1)
    assert given + results["steps_alone"] + results["steps_taught"] == NUM_STEPS

    for role in ("receiver", "donor"):
        weights = pair.weights(role)
        assert all(tensor.isfinite().all() for tensor in weights.values())
        assert largest_difference(weights, pair.weights(role, rank=1)) == 0.0
    assert fates["rejected"] == fates["alien"] == 0
    if exchange in LOCKSTEP:
        assert (given, results["steps_alone"], results["steps_taught"]) == (NUM_STEPS, 0, 0)
        assert fates["dropped"] == fates["skipped"] == 0
    if is_exact:
        expected = undisturbed(LOCKSTEP[exchange], *donor_flags)
        assert largest_difference(pair.weights(), expected) == 0.0
    accuracies = results["accuracies (%)"]
    assert accuracies["h1"] > 75
    if exchange != "head":  # its gradients are at features that the receiver's backbone never had
        assert accuracies["h2"] > 80
