"""What is shown in TensorBoard beside scalars."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import ProjectConfiguration
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.unit.full_disk import no_file_above
from toolkit import metrics, patience
from toolkit.metrics import PatientTensorBoard, image_grid, start_tracking


# TensorBoard's own thread ends with the error, and says so.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_that_curves_have_a_gap_where_the_disk_failed_and_go_on(
    tmp_path: Path,
    fresh_state: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(metrics, "RETRY_SECONDS", 0.0)
    PartialState(cpu=True)
    tracker = PatientTensorBoard("job", tmp_path)
    tracker.start()
    tracker.log({"loss": 1.0}, step=1)
    with no_file_above(0):
        for step in (2, 3):
            tracker.log({"loss": 2.0}, step=step)
            tracker.flush()
    tracker.log({"loss": 4.0}, step=4)
    tracker.finish()
    tracker.flush()

    curve = EventAccumulator(str(tmp_path / "job")).Reload().Scalars("loss")
    assert {event.step: event.value for event in curve} == {1: 1.0, 4: 4.0}
    assert caplog.text.count("TensorBoard's curves have a gap at step 2: [Errno 27]") == 1


def test_that_curves_begin_once_the_disk_lets_them(
    tmp_path: Path, fresh_state: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "RETRY_SECONDS", 0.01)
    accelerator = Accelerator(
        cpu=True, log_with="tensorboard", project_config=ProjectConfiguration(str(tmp_path))
    )
    start, tries = PatientTensorBoard.start, []

    def fail_twice(tracker: PatientTensorBoard) -> None:
        tries.append(tracker)
        if len(tries) < 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        start(tracker)

    monkeypatch.setattr(PatientTensorBoard, "start", fail_twice)
    start_tracking(accelerator, tmp_path / "job", {"lr": 0.1})
    accelerator.log({"loss": 3.0}, step=1)
    accelerator.end_training()

    found = EventAccumulator(str(tmp_path / "job")).Reload()
    assert [event.value for event in found.Scalars("loss")] == [3.0]
    assert "configuration/text_summary" in found.Tags()["tensors"]


def test_that_a_grid_keeps_rows_and_columns() -> None:
    images = torch.zeros(2, 3, 4, 4)
    images[0, 2], images[1, 0] = 0.5, 7.0

    grid = image_grid(images, zoom=2, gap=1)

    assert grid.shape == (1, 20, 30)
    cells = grid.view(2, 10, 3, 10)
    assert cells[:, 5, :, 5].tolist() == [[0.0, 0.0, 0.5], [1.0, 0.0, 0.0]]
    assert bool((cells[:, [0, -1]] == 1).all())
    assert bool((cells[..., [0, -1]] == 1).all())
