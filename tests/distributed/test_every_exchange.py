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
from toolkit.bridge.config import EXCHANGES

pytestmark = pytest.mark.slow

EVERY_RANK = ROOT / "tests" / "jobs" / "every_rank_recipe.py"
NUM_STEPS, INTERVAL, LOCAL_STEPS = 400, 40, 8
CHECKPOINTS = ("--checkpointing_steps", INTERVAL, "--checkpoints_total_limit", 2)
RESUME = ("--resume_from_checkpoint", "latest")
# Those in which both jobs wait for each other: nothing depends on which of them is faster.
EXACT = ("gradient", "delta", "auto")


class Pair:
    """A donor and a receiver in a directory of their own."""

    def __init__(self, launcher: Launcher, directory: Path, exchange: str) -> None:
        self._launcher, self.directory, self.exchange = launcher, directory, exchange
        self.recipes = Recipes(launcher, directory)
        directory.mkdir(exist_ok=True)

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
        return [self.start(DONOR, *flags), receiver]

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


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The weights of a run of an exchange that nobody disturbs, trained when first asked for."""
    directory = tmp_path_factory.mktemp("undisturbed")
    found: dict[str, dict[str, Tensor]] = {}

    def train(exchange: str) -> dict[str, Tensor]:
        if exchange not in found:
            with Launcher(directory) as launcher:
                pair = Pair(launcher, directory / exchange, exchange)
                pair.train(NUM_STEPS)
                found[exchange] = pair.weights()
        return found[exchange]

    return train


@pytest.mark.parametrize("how", ["killed", "ended"])
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_that_both_jobs_go_on_where_they_were(
    launcher: Launcher, tmp_path: Path, undisturbed: Any, exchange: str, how: str
) -> None:
    pair = Pair(launcher, tmp_path / "pair", exchange)
    if how == "ended":
        pair.train(NUM_STEPS // 2)
        assert pair.results()["completed_steps"] == NUM_STEPS // 2
    else:
        donor, receiver = pair.start_both(NUM_STEPS)
        step = f"step_{2 * INTERVAL}"
        wait_until(pair.recipes.path("0001", "receiver", step).exists, "two checkpoints")
        wait_until(lambda: list(pair.recipes.path("0001", "donor").glob("step_*")), "the donor's")
        receiver.kill()
        donor.kill()
        assert not pair.recipes.path("0001", "receiver", "results.json").exists(), "too late"
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
    if exchange in EXACT:
        assert (given, results["steps_alone"], results["steps_taught"]) == (NUM_STEPS, 0, 0)
        assert fates["dropped"] == fates["rejected"] == fates["skipped"] == 0
        assert largest_difference(pair.weights(), undisturbed(exchange)) == 0.0
    else:
        assert fates["rejected"] == 0
    accuracies = results["accuracies (%)"]
    assert accuracies["h1"] > 75
    # Gradients of the donor's own head are at features that the receiver's backbone never had.
    assert accuracies["h2"] > (0 if exchange == "head" else 80)
