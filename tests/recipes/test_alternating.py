"""``recipes/alternating.py`` as launched: which layers move, two ranks, resume, bad input."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.launching import Job, Launcher

RECIPE = "recipes/alternating.py"
LAYERS = ("hidden_task1", "hidden_task2", "output")
STEPS, STEPS_PER_TASK = 20, 5
OF_TASKS = {"loss/task": "per sample", "accuracy/task": "%"}  # beginnings of tags, and their unit
COMMON = [f"--max_train_steps={STEPS}", f"--steps_per_task={STEPS_PER_TASK}"]
# An epoch has 1437 images: 6 steps, the last one short. Both jobs see the same 240 images a step.
PAIR = ["--gradient_accumulation_steps=2", "--optimizer=sgd", "--learning_rate=0.05"]
PAIR += ["--optimizer_args", "momentum=0.9", "nesterov=True"]
PAIR += ["--optimizer_form=foreach", "--reset_state", "--seed=3"]
BATCH_SIZE = {1: 120, 2: 60}
# By number of processes: at the end of a turn, where --reset_state has its effect; and inside one.
CHECKPOINT = {1: 10, 2: 13}


def start(launcher: Launcher, output_dir: Path, *flags: str, num_processes: int = 1) -> Job:
    arguments = [*COMMON, f"--output_dir={output_dir}", *flags]
    return launcher(RECIPE, *arguments, num_processes=num_processes)


def start_pair(launcher: Launcher, output_dir: Path, num_processes: int, *flags: str) -> Job:
    settings = [*PAIR, f"--per_device_train_batch_size={BATCH_SIZE[num_processes]}"]
    settings += [f"--checkpointing_steps={CHECKPOINT[num_processes]}"]
    return start(launcher, output_dir, *settings, *flags, num_processes=num_processes)


def results_of(output_dir: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((output_dir / "results.json").read_text())
    return content


def moved(changes: dict[str, Any], kind: str = "weight_steps") -> dict[str, list[int]]:
    return {task: [layers[name][kind] for name in LAYERS] for task, layers in changes.items()}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """``one`` and ``two``: the same training on one rank, and on two with half the batch each."""
    path = tmp_path_factory.mktemp("alternating")
    with Launcher(path) as launcher:
        jobs = [start_pair(launcher, path / name, n) for name, n in (("one", 1), ("two", 2))]
        for job in jobs:
            job.wait(120)
        (path / "output").write_text(jobs[1].output())
        yield path


@pytest.mark.parametrize(("name", "num_processes"), [("one", 1), ("two", 2)])
def test_only_the_layer_in_training_and_the_output_change(
    directory: Path, name: str, num_processes: int
) -> None:
    results = results_of(directory / name)
    assert results["num_processes"] == num_processes
    assert results["completed_steps"] == STEPS
    for kind in ("weight_steps", "state_steps"):
        assert moved(results["changes"], kind) == {"task1": [10, 0, 10], "task2": [0, 10, 10]}
    assert set(results["accuracies (%)"]) == {"task1", "task2"}

    events = EventAccumulator(str(directory / name)).Reload()
    of_tasks = {f"{tag}{task} [{unit}]" for task in (1, 2) for tag, unit in OF_TASKS.items()}
    of_layers = {f"change/{layer} [max abs]" for layer in LAYERS}
    assert set(events.Tags()["scalars"]) == of_tasks | of_layers | {"train/task [number]"}
    tasks = [event.value for event in events.Scalars("train/task [number]")]
    assert tasks == [1] * 5 + [2] * 5 + [1] * 5 + [2] * 5
    for layer, at_rest in (("hidden_task1", 2), ("hidden_task2", 1), ("output", None)):
        for task, event in zip(tasks, events.Scalars(f"change/{layer} [max abs]"), strict=True):
            assert (event.value == 0.0) if task == at_rest else (event.value > 0.0), (layer, event)
    for task in (1, 2):
        losses = events.Scalars(f"loss/task{task} [per sample]")
        assert [loss.step for loss in losses] == [n + 1 for n in range(20) if tasks[n] == task]
        (accuracy,) = events.Scalars(f"accuracy/task{task} [%]")
        assert accuracy.value == pytest.approx(results["accuracies (%)"][f"task{task}"])


def test_that_the_main_process_alone_prints_the_table(directory: Path) -> None:
    output = (directory / "output").read_text()
    assert output.count("What the steps of each task changed") == 1
    rows = [" ".join(line.split()) for line in output.splitlines()]
    assert sum(row.startswith("hidden_task2 unchanged unchanged 0") for row in rows) == 1
    assert sum(row.startswith("output changed in 10 changed in 10") for row in rows) == 2


def test_two_ranks_train_as_one_of_twice_the_batch(directory: Path) -> None:
    one, two = (load_file(directory / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert {name.split(".")[0] for name in one} == set(LAYERS)
    torch.testing.assert_close(one, two, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_resume_is_bitwise(directory: Path, launcher: Launcher, tmp_path: Path) -> None:
    jobs = []
    for name, num_processes in (("one", 1), ("two", 2)):
        checkpoint = directory / name / f"step_{CHECKPOINT[num_processes]}"
        flag = f"--resume_from_checkpoint={checkpoint}"
        jobs.append(start_pair(launcher, tmp_path / name, num_processes, flag))
    for job, name in zip(jobs, ("one", "two"), strict=True):
        job.wait(120)
        assert results_of(tmp_path / name)["changes"] == results_of(directory / name)["changes"]
        weights, again = (
            load_file(path / name / "model.safetensors") for path in (directory, tmp_path)
        )
        assert weights.keys() == again.keys()
        assert all(torch.equal(weights[key], again[key]) for key in weights)


@pytest.mark.slow
def test_what_happens_without_freezing_and_that_other_optimizers_hold(
    launcher: Launcher, tmp_path: Path
) -> None:
    zeros = ("--no-set_to_none", "--report_to=none")
    jobs = {
        "naive": start(launcher, tmp_path / "naive", "--freezing=requires_grad", *zeros),
        "held": start(
            launcher,
            tmp_path / "held",
            *("--optimizer=ADAMW", "--optimizer_form=fused", "--mixed_precision=bf16"),
            *("--optimizer_args", "betas=(0.8,0.99)", "amsgrad=True", *zeros),
            num_processes=2,
        ),
    }
    for job in jobs.values():
        job.wait(120)
    # In its first 5 steps task 1 finds no moments of hidden_task2 yet.
    changes = results_of(tmp_path / "naive")["changes"]
    assert moved(changes) == {"task1": [10, 5, 10], "task2": [10, 10, 10]}
    results = results_of(tmp_path / "held")
    assert results["num_processes"] == 2
    assert moved(results["changes"]) == {"task1": [10, 0, 10], "task2": [0, 10, 10]}


@pytest.mark.slow
def test_bad_input(launcher: Launcher, tmp_path: Path) -> None:
    messages = {
        "--optimizer_args=betas=3": "error: Adam fails with these arguments",
        "--per_device_train_batch_size=2000": "error: no full batch: give a smaller --per_device",
    }
    output = f"--output_dir={tmp_path / 'out'}"
    jobs = {flag: launcher(RECIPE, flag, output) for flag in messages}
    for flag, message in messages.items():
        assert jobs[flag].wait(120, check=False) != 0
        assert message in jobs[flag].output()
        ours, _, _ = jobs[flag].output().partition("error: ")
        assert "Traceback" not in ours
