"""What recipes give to trackers, and to TensorBoard beside plain ``accelerator.log`` scalars."""

from __future__ import annotations

import atexit
import contextlib
import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, TensorBoardTracker, on_main_process
from torch import Tensor
from torch.nn import functional
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from toolkit.bridge.job import BridgeJob
from toolkit.dashboard import (
    BRIDGE_CHARTS,
    CHARTS,
    Events,
    exchange_table,
    hyperparameters,
    layout,
    plain,
    settings_table,
)
from toolkit.patience import write_patiently
from toolkit.provenance import environment

logger = logging.getLogger(__name__)

RETRY_SECONDS = 5.0  # from a failure of TensorBoard's disk to the next file
# The page "Custom Scalars" calls a line "tag (run)", takes its run to be all between the outer
# parentheses, and draws nothing where there is no such run.
_BRACKETS = str.maketrans("()", "[]")
PROJECT = "gradient-bridge"  # of trackers other than TensorBoard
# What they call a run's name; the others choose one.
NAME_ARGUMENTS = {"trackio": "name", "wandb": "name"}


def start_tracking(
    accelerator: Accelerator,
    output_dir: Path,
    config: Mapping[str, Any],
    bridge: BridgeJob | None = None,
) -> None:
    """Begin to record, with the run's configuration, by TensorBoard below ``output_dir``.

    Other trackers write where they always do, both jobs into one project.

    Args:
        accelerator: made with ``log_with``; without trackers nothing happens.
        output_dir: the directory of the TensorBoard files; its name becomes the run's.
        config: settings by name; values of other types than bool, int, float and str are recorded
            as text.
        bridge: the job's side of the bridge, if it has one: adds its charts and what crosses.

    Raises:
        BridgeError: if the disk refuses them for a minute, saying what to do.
    """
    accelerator.project_configuration.logging_dir = str(output_dir.parent)
    surroundings = {"num_processes": accelerator.num_processes, **environment(accelerator)}
    name = _run_name(output_dir)
    texts = {
        "configuration/settings": settings_table(config) + "\n\n" + settings_table(surroundings)
    }
    if bridge is not None:
        texts["configuration/exchange"] = exchange_table(bridge.shared, bridge.config)
    charts = CHARTS if bridge is None else BRIDGE_CHARTS
    boards = [
        PatientTensorBoard(output_dir.name, output_dir.parent, charts, texts)
        for kind in accelerator.log_with
        if str(kind) == "tensorboard"
    ]
    others = [kind for kind in accelerator.log_with if str(kind) != "tensorboard"]
    accelerator.log_with = [*boards, *others]

    def begin() -> None:
        accelerator.trackers = []  # of a try that failed
        accelerator.init_trackers(
            PROJECT,
            plain(config),
            {tracker: {argument: name} for tracker, argument in NAME_ARGUMENTS.items()},
        )

    write_patiently("the curves in", output_dir, begin)
    for board in boards:
        atexit.register(board.flush)  # a job that is interrupted leaves all its curves


def _run_name(output_dir: Path) -> str:
    return f"{output_dir.parent.name}-{output_dir.name}"


def closing_line(accelerator: Accelerator, output_dir: Path, runs_dir: Path | None = None) -> str:
    """Where a job's results are, and by what its metrics can be looked at.

    Args:
        accelerator: whose trackers :func:`start_tracking` has begun.
        output_dir: of the job.
        runs_dir: whose jobs TensorBoard shows together, if ``output_dir`` is one of theirs.
    """
    places = []
    for tracker in accelerator.log_with:
        kind = tracker.name if isinstance(tracker, GeneralTracker) else str(tracker)
        if isinstance(tracker, PatientTensorBoard):
            is_inside = runs_dir and output_dir.resolve().is_relative_to(runs_dir.resolve())
            places.append(f"tensorboard --logdir {runs_dir if is_inside else output_dir}")
        elif kind in NAME_ARGUMENTS:
            places.append(f"{kind}, run {_run_name(output_dir)} of project {PROJECT}")
        else:
            places.append(kind)
    curves = f"curves: {' and '.join(places)}" if places else "no curves were recorded"
    return f"results: {output_dir}; {curves}"


class PatientTensorBoard(TensorBoardTracker):
    """TensorBoard's curves, which have a gap where the disk failed: that ends no training.

    TensorBoard's own writer raises for ever what its disk has raised once.

    Args:
        run_name: directory of the files, below ``logging_dir``.
        logging_dir: of all runs.
        charts: of the page "Custom Scalars".
        texts: Markdown by tag, of step 0.
    """

    writer: SummaryWriter | None
    _next_try = 0.0

    def __init__(
        self,
        run_name: str,
        logging_dir: Path,
        charts: Mapping[str, str] = CHARTS,
        texts: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(run_name, logging_dir)
        self._charts, self._texts = charts, texts or {}
        self._events = Events()

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Record settings as hparams, the texts, and the layout of the charts.

        Accelerate's own way opens a second run, named after the time. No list of metrics is given:
        so TensorBoard puts the hparams that differ between runs first.
        """
        assert self.writer is not None
        for tag, text in self._texts.items():
            self.writer.add_text(tag, text)
        self.writer.add_custom_scalars(layout(self._charts))
        _, session, _ = hparams(hyperparameters(values), {})
        self.writer._get_file_writer().add_summary(session)
        self.writer.flush()

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Record scalars, with the unit in brackets, unless the disk fails."""
        try:
            if self.writer is None:
                if time.monotonic() < self._next_try:
                    return
                self.start()
            super().log({t.translate(_BRACKETS): v for t, v in values.items()}, step, **kwargs)
            if step is not None and self._events.note(values, step):
                self._write_events(step)
        except OSError as error:
            logger.warning("TensorBoard's curves have a gap at step %s: %s", step, error)
            self.writer, self._next_try = None, time.monotonic() + RETRY_SECONDS

    @on_main_process
    def log_images(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Record images (N, C, H, W), unless the disk fails."""
        if self.writer is not None:
            with _saying_what_is_lost():
                super().log_images(values, step, **kwargs)

    @on_main_process
    def flush(self) -> None:
        """Give to the system what was recorded."""
        if self.writer is not None:
            with _saying_what_is_lost():
                if self._events.is_longer:
                    self._write_events(self._events.last_step)
                self.writer.flush()

    @on_main_process
    def finish(self) -> None:
        """Close the file."""
        self.flush()
        if self.writer is not None:
            with _saying_what_is_lost():
                super().finish()

    def _write_events(self, step: int) -> None:
        # All so far: TensorBoard keeps few texts of a tag, but always the last one.
        assert self.writer is not None
        self.writer.add_text("events", self._events.table(), step)


@contextlib.contextmanager
def _saying_what_is_lost() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        logger.warning("the end of TensorBoard's curves is lost: %s", error)


def image_grid(images: Tensor, *, zoom: int = 5, gap: int = 8) -> Tensor:
    """Lay small grey images out in rows and columns, enlarged, on white.

    Args:
        images: (rows, columns, H, W); what lies outside [0, 1] is clipped.
        zoom: how much larger each gets, smoothly.
        gap: pixels around each.

    Returns:
        (1, rows * (H * zoom + 2 * gap), columns * (W * zoom + 2 * gap)) in [0, 1].
    """
    large = functional.interpolate(images.clamp(0, 1), scale_factor=zoom, mode="bicubic").clamp(
        0, 1
    )
    framed = functional.pad(large, (gap, gap, gap, gap), value=1.0)
    return framed.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)[None]
