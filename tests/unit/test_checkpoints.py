"""Checkpoints and result files, on disks that refuse them for a while or for ever."""

from __future__ import annotations

import errno
import logging
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from toolkit import patience
from toolkit.bridge.errors import BridgeError
from toolkit.checkpoints import (
    CompletedSteps,
    find_checkpoint,
    refuse_other_settings,
    save_checkpoint,
)
from toolkit.patience import write_patiently
from toolkit.training import write_results


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fails is tried four times in all."""
    monkeypatch.setattr(patience, "RETRY_SECONDS", 0.01)
    monkeypatch.setattr(patience, "PATIENCE_SECONDS", 0.03)


def test_checkpoints(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    completed = CompletedSteps()
    accelerator.register_for_checkpointing(completed)
    (tmp_path / ".saving-step_1").mkdir()  # of a job that was killed
    for step in (8, 9, 10):
        completed.value = step
        save_checkpoint(accelerator, tmp_path, step, total_limit=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_10", "step_9"]
    latest = find_checkpoint("latest", tmp_path)
    assert latest.name == "step_10"
    completed.value = 0
    accelerator.load_state(str(latest))
    assert completed.value == 10
    with pytest.raises(ValueError, match=r"step_8 is no checkpoint.*\['step_9', 'step_10'\]"):
        find_checkpoint(str(tmp_path / "step_8"), tmp_path)
    with pytest.raises(ValueError, match=r"no checkpoint in .* to resume from"):
        find_checkpoint("latest", tmp_path / "elsewhere")


def test_that_a_checkpoint_of_other_settings_is_refused_before_it_is_loaded(
    tmp_path: Path,
) -> None:
    def job(**settings: Any) -> tuple[Accelerator, CompletedSteps]:
        accelerator, completed = Accelerator(cpu=True), CompletedSteps()
        accelerator.register_for_checkpointing(completed)
        refuse_other_settings(accelerator, settings)
        return accelerator, completed

    accelerator, completed = job(method="sum", donors=["h2"])
    completed.value = 1
    save_checkpoint(accelerator, tmp_path, 1, total_limit=None)
    checkpoint = str(tmp_path / "step_1")
    for settings, message in (
        ({"method": "rotograd"}, "of --method sum, and this job has --method rotograd"),
        ({"method": "sum", "donors": ["h2", "h3"]}, "of --donors h2, and .* has --donors h2 h3"),
    ):
        accelerator, completed = job(**settings)
        with pytest.raises(ValueError, match=message):
            accelerator.load_state(checkpoint)
        assert completed.value == 0
    for settings in ({"method": "sum", "donors": ["h2"]}, {}):
        accelerator, completed = job(**settings)
        accelerator.load_state(checkpoint)
        assert completed.value == 1
    Path(checkpoint, "settings.json").unlink()  # of a job that kept none
    job(method="rotograd")[0].load_state(checkpoint)


def failing(function: Callable[..., Any], times: int) -> Callable[..., Any]:
    """The function, after so many calls that the disk refuses."""
    left = times

    def call(*args: Any, **options: Any) -> Any:
        nonlocal left
        if left:
            left -= 1
            raise OSError(errno.ENOSPC, "No space left on device")
        return function(*args, **options)

    return call


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize(
    ("owner", "name"), [(Accelerator, "save_state"), (Path, "rename"), (shutil, "rmtree")]
)
@pytest.mark.usefixtures("fresh_state", "impatient")
def test_that_a_disk_that_fails_for_a_while_costs_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, times: int
) -> None:
    accelerator, steps = Accelerator(cpu=True), CompletedSteps()
    accelerator.register_for_checkpointing(steps)
    for steps.value in (1, 2):
        save_checkpoint(accelerator, tmp_path, steps.value, 2)
    (tmp_path / ".saving-step_9").mkdir()  # of a job that was killed
    monkeypatch.setattr(owner, name, failing(getattr(owner, name), times))

    for steps.value in (2, 3):  # 2 once more, after a resume
        save_checkpoint(accelerator, tmp_path, steps.value, 2)

    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_2", "step_3"]
    for step in (2, 3):
        accelerator.load_state(str(tmp_path / f"step_{step}"))
        assert steps.value == step


@pytest.mark.usefixtures("impatient")
def test_what_is_said_while_a_disk_fails(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tries: list[int] = []
    write = failing(lambda: tries.append(1), 3)
    with caplog.at_level(logging.WARNING):
        write_patiently("the results in", tmp_path, write)

    first, last = caplog.messages
    assert f"cannot write the results in {tmp_path}: [Errno 28]" in first
    assert first.startswith("DISK FAILS since 0 s, trying again for about 0.03 s")
    assert last == f"the disk took the results in {tmp_path} at try 4"
    assert tries == [1]


@pytest.mark.usefixtures("impatient")
def test_that_what_cannot_be_repeated_is_tried_once(tmp_path: Path) -> None:
    tries: list[int] = []
    write = failing(lambda: tries.append(1), 1)
    with pytest.raises(BridgeError, match="No space left"):
        write_patiently("the checkpoint", tmp_path, write, is_repeatable=False)
    assert tries == []


@pytest.mark.usefixtures("impatient")
def test_that_another_rank_fails(tmp_path: Path) -> None:
    tries: list[int] = []
    with pytest.raises(BridgeError, match="the disk of another rank refuses it"):
        write_patiently("the checkpoint", tmp_path, lambda: tries.append(1), lambda _: True)
    assert len(tries) == 4


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file of this process may grow beyond 20 kB, as on a disk that is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("part", ["model", "optimizer"])
@pytest.mark.usefixtures("fresh_state", "small_files", "impatient")
def test_that_a_checkpoint_that_the_disk_refuses_is_one_line(tmp_path: Path, part: str) -> None:
    accelerator, model = Accelerator(cpu=True), nn.Linear(100, 100)
    optimizer = torch.optim.AdamW(model.parameters())
    if part == "model":
        accelerator.prepare(model)
    else:
        model(torch.ones(100)).sum().backward()
        optimizer.step()
        accelerator.prepare(optimizer)

    with pytest.raises(BridgeError, match=r"cannot write the checkpoint .*step_3: .*Free some"):
        save_checkpoint(accelerator, tmp_path, 3, None)

    assert not (tmp_path / "step_3").exists()


@pytest.mark.usefixtures("fresh_state", "small_files", "impatient")
def test_that_results_that_the_disk_refuses_are_one_line(tmp_path: Path) -> None:
    Accelerator(cpu=True)

    with pytest.raises(BridgeError, match="cannot write the results in"):
        write_results(tmp_path, {}, {"w": torch.zeros(10_000)})

    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.usefixtures("fresh_state")
def test_that_an_error_of_the_code_stays_what_it_is(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)

    def refuse(*_: object) -> None:
        raise RuntimeError("in the middle of a window")

    accelerator.register_save_state_pre_hook(refuse)
    with pytest.raises(RuntimeError, match="middle of a window") as caught:
        save_checkpoint(accelerator, tmp_path, 3, None)

    assert not isinstance(caught.value, BridgeError)
