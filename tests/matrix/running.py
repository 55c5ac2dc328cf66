"""Launches both jobs over a list of runs, and compares what came out with the oracle."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from tests.launching import Launcher
from tests.matrix.joint import Pair, train_jointly
from tests.matrix.mutations import mutations_of
from tests.matrix.overflow import expected_pairs
from tests.matrix.setting import FROZEN, Setting, build_network, to_json
from tests.oracle import largest_difference

JOB = "tests/matrix/job.py"
EXACT = 1e-12
NOISE_RUNS = 8  # joint runs whose batches are split in 1 to 8 parts
MUTATED_STEPS = 3
UNEQUAL_STEPS = 8  # more than an epoch of batches of one size, of which the last is short


@dataclasses.dataclass(frozen=True)
class Run:
    """A setting, perhaps mutated, and where its results are."""

    setting: Setting
    directory: Path
    mutation: str = ""

    def weights(self, rank: int = 0) -> dict[str, Tensor]:
        """The receiver's final weights, and their moving average under ``ema.``."""
        return load_file(self.directory / f"receiver-{rank}.safetensors")

    def pairs(self) -> list[Pair]:
        """The windows of receiver and donor in every step, as the ledger says."""
        own_windows = json.loads((self.directory / "steps.json").read_bytes())["own_windows"]
        (ledger,) = (self.directory / "runs").glob("*/bridge/receiver/ledger-0001.jsonl")
        entries = [json.loads(line) for line in ledger.read_text().splitlines()]
        for key in ("sequence", "receiver_step"):  # one payload each step, each payload once
            assert [entry[key] for entry in entries] == list(range(len(own_windows))), key
        assert {entry["fate"] for entry in entries} <= {"applied", "skipped"}
        return [
            (own, entry["sequence"] if entry["fate"] == "applied" else None)
            for own, entry in zip(own_windows, entries, strict=True)
        ]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How far a run ended from joint training, and how far it may."""

    difference: float
    allowed: float
    rank_difference: float  # of any rank's weights to the main process's

    @property
    def is_accepted(self) -> bool:
        """Whether the oracle lets it pass."""
        return self.difference <= self.allowed and self.rank_difference == 0.0


def runs_of(name: str, setting: Setting, directory: Path, *, is_mutated: bool) -> list[Run]:
    """The case as it is and, where it is mutated, with every mutation that has an effect there."""
    runs = [Run(setting, directory / name)]
    if is_mutated:
        for number, mutation in enumerate(mutations_of(setting)):
            steps = UNEQUAL_STEPS if "mean of means" in mutation else MUTATED_STEPS
            steps = steps if setting.overflow == "no" else setting.num_steps
            short = dataclasses.replace(setting, num_steps=steps)
            runs.append(Run(short, directory / f"{name}-{number}", mutation))
    return runs


def launch(directory: Path, runs: list[Run], timeout: float) -> None:
    """Train all runs, which have the same numbers of ranks, with one launch of each job."""
    (worlds,) = {run.setting.worlds for run in runs}
    listing = directory / "runs.json"
    items = [
        {
            "directory": run.directory.name,
            "setting": to_json(run.setting),
            "mutation": run.mutation,
        }
        for run in runs
    ]
    listing.write_text(json.dumps(items))
    with Launcher(directory) as launcher:
        jobs = [
            launcher(JOB, role, listing, num_processes=ranks, log=directory / f"{role}.log")
            for role, ranks in zip(("receiver", "donor"), worlds, strict=True)
        ]
        for job in jobs:
            job.wait(timeout)


def precision_of(setting: Setting) -> str:
    """The lowest precision of a setting: what it can be held to."""
    used = {setting.receiver.precision, setting.donor.precision}
    if setting.dtype == "float64":
        return "float64"
    return next((precision for precision in ("bf16", "fp16") if precision in used), "float32")


@functools.lru_cache(maxsize=64)
def _joint(setting: Setting, pairs: tuple[Pair, ...], splits: int = 1) -> dict[str, Tensor]:
    return train_jointly(setting, pairs, splits)


def allowed_difference(setting: Setting, pairs: tuple[Pair, ...]) -> float:
    """How far from joint training a setting may end.

    In float32 ten times the noise floor: the largest difference that splitting the batches of
    joint training makes. In lower precision, twice the largest among eight ways to split them.
    """
    if setting.dtype == "float64":
        return EXACT
    joint = [_joint(setting, pairs, splits) for splits in range(1, NOISE_RUNS + 1)]
    if precision_of(setting) == "float32":
        return 10 * max(largest_difference(joint[0], other) for other in joint[1:])
    return 2 * max(largest_difference(a, b) for a, b in itertools.combinations(joint, 2))


def compare(run: Run) -> Outcome:
    """The oracle check of one run.

    Raises:
        AssertionError: if its steps did not take the windows that they must.
    """
    pairs = expected_pairs(run.setting)
    if not run.mutation:
        found = run.pairs()
        # Computing in fp16 may overflow by itself: then the ledger alone knows.
        may_differ = precision_of(run.setting) == "fp16" and run.setting.overflow == "no"
        assert found == pairs or may_differ, found
        pairs = found
    ranks = range(1, run.setting.receiver.ranks)
    return Outcome(
        largest_difference(run.weights(), _joint(run.setting, tuple(pairs))),
        allowed_difference(run.setting, tuple(pairs)),
        max((largest_difference(run.weights(), run.weights(r)) for r in ranks), default=0.0),
    )


def resting(run: Run) -> set[str]:
    """Names of tensors that did not train at all, though nothing froze them."""
    start = dict(build_network(run.setting).named_parameters())
    weights = run.weights()
    frozen = {FROZEN} if run.setting.frozen in ("receiver", "both") else set()
    return {
        name
        for name, tensor in start.items()
        if float((weights[name] - tensor.detach()).abs().max()) < 1e-5
    } - frozen
