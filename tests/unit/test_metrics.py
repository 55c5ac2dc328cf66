"""What is shown in TensorBoard beside scalars."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, PartialState
from accelerate.tracking import GeneralTracker
from accelerate.utils import LoggerType, ProjectConfiguration
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from tests.unit.full_disk import no_file_above
from tests.unit.jobs import ReceiverAlone
from toolkit import metrics, patience
from toolkit.dashboard import BRIDGE_CHARTS
from toolkit.metrics import PatientTensorBoard, closing_line, image_grid, start_tracking


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
    assert "configuration/settings/text_summary" in found.Tags()["tensors"]


def test_what_tensorboard_gets_beside_curves(tmp_path: Path, fresh_state: None) -> None:
    job = ReceiverAlone(tmp_path / "runs", exchange="gradient")
    job.accelerator.log_with = [LoggerType.TENSORBOARD]
    directory = tmp_path / "runs" / "0001" / "receiver"
    settings = {"lr": 0.1, "clip": None, "runs_dir": tmp_path}
    start_tracking(job.accelerator, directory, settings, job.receiver)
    for step in (1, 2, 3):
        events = {"events/donor present (0 or 1)": 1.0, "fates/rejected donor (payloads)": step}
        job.accelerator.log({"loss/own (per sample)": 2.0, **events}, step=step)
    job.accelerator.end_training()
    job.receiver.close()

    found = EventAccumulator(str(directory)).Reload()
    tags = found.Tags()
    assert set(tags["scalars"]) == {
        "loss/own [per sample]", "fates/rejected donor [payloads]", "events/donor present [0 or 1]",
    }  # fmt: skip

    def text(tag: str) -> list[tuple[int, str]]:
        return [
            (event.step, event.tensor_proto.string_val[0].decode())
            for event in found.Tensors(f"{tag}/text_summary")
        ]

    ((_, configuration),) = text("configuration/settings")
    assert "| `lr` | `0.1` |" in configuration
    assert "Not set: `clip`" in configuration
    assert f"| `torch` | `{torch.__version__}` |" in configuration
    ((_, exchange),) = text("configuration/exchange")
    assert exchange.startswith("Exchange `gradient`: ")
    (_, first), (last_step, last) = text("events")
    assert "| 1 | rejected donor (payloads) | 0 | 1 |" in first
    assert last_step == 3
    assert last.splitlines()[2:] == [
        "| 1 | donor present (0 or 1) | 0 | 1 |",
        "| 1 to 3 | rejected donor (payloads) | 0 | 3 |",
    ]

    (session,) = found.PluginTagToContent("hparams").values()
    values = HParamsPluginData.FromString(session).session_start_info.hparams
    assert values["lr"].number_value == 0.1
    assert values["clip"].string_value == "None"
    assert "runs_dir" not in values
    (layout_tag,) = found.PluginTagToContent("custom_scalars")
    (event,) = found.Tensors(layout_tag)
    (category,) = Layout.FromString(event.tensor_proto.string_val[0]).category
    assert [chart.title for chart in category.chart] == list(BRIDGE_CHARTS)
    patterns = [chart.multiline.tag for chart in category.chart]
    assert patterns == [[pattern] for pattern in BRIDGE_CHARTS.values()]


class Tracker(GeneralTracker):
    """Another of Accelerate's kind, which keeps what it gets."""

    name = "kept"
    requires_logging_directory = False

    def __init__(self) -> None:
        super().__init__()
        self.configuration: dict[str, Any] = {}
        self.values: list[tuple[int | None, dict[str, Any]]] = []

    @property
    def tracker(self) -> Tracker:
        return self

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.configuration = values

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        self.values.append((step, values))


def test_that_another_tracker_gets_what_is_logged(tmp_path: Path, fresh_state: None) -> None:
    tracker = Tracker()
    accelerator = Accelerator(cpu=True, log_with=tracker)
    start_tracking(accelerator, tmp_path / "job", {"lr": 0.1, "clip": None, "at": tmp_path})
    accelerator.log({"loss/own (per sample)": 3.0}, step=1)
    accelerator.end_training()
    assert tracker.configuration == {"lr": 0.1, "clip": None, "at": str(tmp_path)}
    assert tracker.values == [(1, {"loss/own (per sample)": 3.0})]
    assert list(tmp_path.iterdir()) == []


def test_closing_line(tmp_path: Path, fresh_state: None) -> None:
    def line(output_dir: Path, *log_with: Any, runs_dir: Path | None = None) -> str:
        accelerator = Accelerator(cpu=True)
        accelerator.log_with = list(log_with)
        return closing_line(accelerator, output_dir, runs_dir)

    runs = tmp_path / "runs"
    job = runs / "0001" / "donor"
    of_job = f"results: {job}; "
    assert line(job) == of_job + "no curves were recorded"
    board = PatientTensorBoard(job.name, job.parent)
    assert line(job, board) == of_job + f"curves: tensorboard --logdir {job}"
    assert line(job, board, runs_dir=runs) == of_job + f"curves: tensorboard --logdir {runs}"
    elsewhere = tmp_path / "elsewhere"
    said = line(elsewhere, board, runs_dir=runs)
    assert said == f"results: {elsewhere}; curves: tensorboard --logdir {elsewhere}"
    trackio = LoggerType.TRACKIO
    said = line(job, trackio, runs_dir=runs)
    assert said == of_job + "curves: trackio, run 0001-donor of project gradient-bridge"
    assert line(job, LoggerType.CLEARML, Tracker()) == of_job + "curves: clearml and kept"


def test_that_a_grid_keeps_rows_and_columns() -> None:
    images = torch.zeros(2, 3, 4, 4)
    images[0, 2], images[1, 0] = 0.5, 7.0

    grid = image_grid(images, zoom=2, gap=1)

    assert grid.shape == (1, 20, 30)
    cells = grid.view(2, 10, 3, 10)
    assert cells[:, 5, :, 5].tolist() == [[0.0, 0.0, 0.5], [1.0, 0.0, 0.0]]
    assert bool((cells[:, [0, -1]] == 1).all())
    assert bool((cells[..., [0, -1]] == 1).all())
