"""``recipes/adversarial.py`` as launched: leak check, drawings, two ranks, resume, bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.launching import Job, Launcher

STEPS = 20  # an epoch has 29 batches of 60: on one rank 15 steps with a short one, on two 7
FLAGS = [f"--max_train_steps={STEPS}", "--leak_check_steps=3", "--eval_steps=8"]
FLAGS += ["--gradient_accumulation_steps=2"]


def start(launcher: Launcher, output_dir: Path, *flags: str, num_processes: int = 1) -> Job:
    arguments = [*FLAGS, f"--output_dir={output_dir}", *flags]
    return launcher("recipes/adversarial.py", *arguments, num_processes=num_processes)


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [1, 2])
def test_resume_is_bitwise_and_nothing_leaks(
    launcher: Launcher, tmp_path: Path, num_processes: int
) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    checkpoints = ("--checkpointing_steps=11", "--per_device_train_batch_size=60")
    job = start(launcher, whole, *checkpoints, num_processes=num_processes)
    job.wait(120)
    assert "leak check: nothing moved that was to rest, in 3 steps checked" in job.output()
    results = json.loads((whole / "results.json").read_text())
    assert results["num_processes"] == num_processes
    assert results["completed_steps"] == STEPS
    assert 0 <= results["recognised (%)"] <= 100

    checkpoint = f"--resume_from_checkpoint={whole / 'step_11'}"
    start(launcher, resumed, *checkpoints, checkpoint, num_processes=num_processes).wait(120)
    weights, again = (load_file(path / "model.safetensors") for path in (whole, resumed))
    assert {name.split(".")[0] for name in weights} == {"critic", "generator"}
    assert weights.keys() == again.keys()
    assert all(torch.equal(weights[name], again[name]) for name in weights)

    events = EventAccumulator(str(whole)).Reload()
    drawings = events.Images("validation/drawings")
    assert [drawing.step for drawing in drawings] == [8, 16, STEPS]
    assert (drawings[-1].width, drawings[-1].height) == (12 * 56, 10 * 56)
    assert set(events.Tags()["scalars"]) == {
        *("loss/critic [per sample]", "loss/generator [per sample]"),
        "accuracy/drawings recognised [%]",
    }


@pytest.mark.slow
def test_bad_input(launcher: Launcher) -> None:
    messages = {
        "--per_device_train_batch_size=2000": "give a smaller --per_device_train_batch_size",
        "--resume_from_checkpoint=latest": "latest needs the --output_dir",
        "--critic_learning_rate=0": "expected a number above 0, got '0'",
    }
    jobs = {flag: launcher("recipes/adversarial.py", flag) for flag in messages}
    for flag, message in messages.items():
        assert jobs[flag].wait(120, check=False) != 0
        assert message in jobs[flag].output()
