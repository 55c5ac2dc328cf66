"""``recipes/joint.py`` as launched: against sums by hand, on two ranks, and resumed."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.nn import functional as F

from tests import oracle
from tests.launching import Launcher
from toolkit.bundled import load_task
from toolkit.data import in_memory, window_indices

Run = Callable[..., Path]
STEPS = 12
# Three windows per epoch of the receiver, the last one short; four of the donor's would not fit.
SIZES = {"per_device_train_batch_size": 7, "gradient_accumulation_steps": 2}
SIZES |= {"receiver_processes": 2, "donor_batch_size": 11, "donor_processes": 3}
SIZES |= {"donor_accumulation_steps": 1, "max_train_steps": STEPS, "seed": 5}
WEIGHT = 0.7
RATES = {"backbone": 0.1, "heads.h1": 0.03, "heads.h2": 0.2}
CLIP = 0.9


@pytest.fixture
def run(launcher: Launcher, tmp_path: Path) -> Run:
    """Launch the recipe in float64 with SGD and return its output directory."""

    def launch(name: str, *flags: str, num_processes: int = 1) -> Path:
        output_dir = tmp_path / name
        common = [f"--{key}={value}" for key, value in SIZES.items()]
        common += [f"--donor_weight={WEIGHT}", "--learning_rate=0.1"]
        common += ["--lr_head1=0.03", "--lr_head2=0.2"]
        common += ["--dtype=float64", "--optimizer=sgd", "--weight_decay=0"]
        common += [f"--max_grad_norm={CLIP}", f"--output_dir={output_dir}"]
        job = launcher("recipes/joint.py", *common, *flags, num_processes=num_processes)
        job.wait(180)
        return output_dir

    return launch


def by_hand(rule: str, reduction: str) -> dict[str, Tensor]:
    """The same training in the plainest way."""
    task = load_task("digits", seed=5)
    model = task.build_model(task.classes_of(["h1", "h2"]), seed=5).double()
    own_data, donor_data = (in_memory(task.train[head], head) for head in ("h1", "h2"))
    windows = zip(
        window_indices(len(own_data), 7, 2, 2, seed=5),
        window_indices(len(donor_data), 11, 1, 3, seed=5),
        strict=True,
    )
    for own, donor in islice(windows, STEPS):
        losses = []
        for head, data, rows in (("h1", own_data, own), ("h2", donor_data, donor)):
            images, labels = data[rows]
            logits = model(images.double(), [head])[head]
            losses.append(F.cross_entropy(logits, labels, reduction="none"))
        first, second = losses
        loss = {
            ("match", "mean"): first.mean() + WEIGHT * second.mean(),
            ("append", "sum"): first.sum() + WEIGHT * second.sum(),
            ("pool", "mean"): torch.cat([first, WEIGHT * second]).mean(),
        }[rule, reduction]
        names, parameters = zip(*model.named_parameters(), strict=True)
        gradients = torch.autograd.grad(loss, parameters)
        norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
        with torch.no_grad():
            for name, parameter, gradient in zip(names, parameters, gradients, strict=True):
                (rate,) = (rate for part, rate in RATES.items() if name.startswith(f"{part}."))
                parameter.sub_(rate * gradient * min(1.0, CLIP / float(norm + 1e-6)))
    return model.state_dict()


def largest_difference(output_dir: Path, expected: dict[str, Tensor]) -> float:
    found = load_file(output_dir / "model.safetensors")
    return oracle.largest_difference(found, expected)


@pytest.mark.parametrize(
    ("rule", "reduction", "num_processes"),
    [
        pytest.param("pool", "mean", 2, marks=pytest.mark.slow),
        pytest.param("match", "mean", 1, marks=pytest.mark.slow),
        pytest.param("match", "mean", 2, marks=pytest.mark.slow),  # the bridge's tests run it too
        pytest.param("append", "sum", 1, marks=pytest.mark.slow),
    ],
)
def test_equals_sums_by_hand(run: Run, rule: str, reduction: str, num_processes: int) -> None:
    flags = (f"--rescale={rule}", f"--loss_reduction={reduction}")
    output_dir = run("run", *flags, num_processes=num_processes)
    results = json.loads((output_dir / "results.json").read_text())
    assert results["num_processes"] == num_processes
    assert results["completed_steps"] == STEPS
    assert set(results["accuracies (%)"]) == {"h1", "h2"}
    assert largest_difference(output_dir, by_hand(rule, reduction)) < 1e-12


@pytest.mark.slow
def test_resume_is_bitwise(run: Run) -> None:
    schedule = ("--lr_scheduler_type=cosine", "--num_warmup_steps=2", "--checkpointing_steps=5")
    whole = run("whole", *schedule)
    assert sorted(path.name for path in whole.glob("step_*")) == ["step_10", "step_5"]
    (whole / "step_10").rename(whole / "elsewhere")
    weights = load_file(whole / "model.safetensors")
    again = run("whole", *schedule, "--resume_from_checkpoint=latest")
    assert largest_difference(again, weights) == 0.0
    assert (again / "step_10").is_dir()


def test_tensorboard(run: Run) -> None:
    output_dir = run("watched")
    events = EventAccumulator(str(output_dir)).Reload()
    tags = set(events.Tags()["scalars"])
    assert {"loss/own [per sample]", "loss/donor [per sample]", "accuracy/h1 [%]"} <= tags
    assert [event.step for event in events.Scalars("loss/own [per sample]")] == list(
        range(1, STEPS + 1)
    )
