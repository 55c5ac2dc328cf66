"""What recipes write to TensorBoard beside plain ``accelerator.log`` scalars."""

from __future__ import annotations

import atexit
import contextlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import TensorBoardTracker, on_main_process
from torch import Tensor
from torch.nn import functional
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from toolkit.patience import write_patiently

logger = logging.getLogger(__name__)

RETRY_SECONDS = 5.0  # from a failure of TensorBoard's disk to the next file


def start_tracking(
    accelerator: Accelerator, output_dir: Path, config: Mapping[str, Any], metrics: Sequence[str]
) -> None:
    """Begin to record below ``output_dir``, with the run's configuration as text and as hparams.

    Accelerate's own way of storing a configuration opens a second TensorBoard run of its own,
    named after the time; here both go into the run that the scalars go to.

    Args:
        accelerator: made with ``log_with``; without trackers nothing happens.
        output_dir: the directory of the TensorBoard files; its name becomes the run's.
        config: settings by name; values of other types than bool, int, float and str are shown as
            text.
        metrics: tags of the scalars that the hparams table shows.

    Raises:
        BridgeError: if the disk refuses them for a minute, saying what to do.
    """
    accelerator.project_configuration.logging_dir = str(output_dir.parent)
    accelerator.log_with = [
        PatientTensorBoard(output_dir.name, output_dir.parent)
        if str(name) == "tensorboard"
        else name
        for name in accelerator.log_with
    ]

    def begin() -> None:
        accelerator.trackers = []  # of a try that failed
        accelerator.init_trackers(output_dir.name)
        if accelerator.is_main_process and accelerator.trackers:
            _describe(accelerator.get_tracker("tensorboard", unwrap=True), config, metrics)

    write_patiently("the curves in", output_dir, begin)
    if accelerator.is_main_process and accelerator.trackers:
        # A job that is interrupted leaves all its curves.
        atexit.register(accelerator.get_tracker("tensorboard").flush)


def _describe(writer: Any, config: Mapping[str, Any], metrics: Sequence[str]) -> None:
    plain = {
        name: value if isinstance(value, (bool, int, float, str)) else str(value)
        for name, value in config.items()
    }
    rows = [f"| `{name}` | `{value}` |" for name, value in plain.items()]
    writer.add_text("configuration", "\n".join(["| setting | value |", "|---|---|", *rows]))
    for summary in hparams(plain, dict.fromkeys(metrics, 0.0)):
        writer.file_writer.add_summary(summary)
    writer.flush()


class PatientTensorBoard(TensorBoardTracker):
    """TensorBoard's curves, which have a gap where the disk failed: that ends no training.

    TensorBoard's own writer raises for ever what its disk has raised once.
    """

    writer: SummaryWriter | None
    _next_try = 0.0

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Record scalars, unless the disk fails."""
        try:
            if self.writer is None:
                if time.monotonic() < self._next_try:
                    return
                self.start()
            super().log(values, step, **kwargs)
        except OSError as error:
            logger.warning("TensorBoard's curves have a gap at step %s: %s", step, error)
            self.writer, self._next_try = None, time.monotonic() + RETRY_SECONDS

    @on_main_process
    def flush(self) -> None:
        """Give to the system what was recorded."""
        if self.writer is not None:
            with _saying_what_is_lost():
                self.writer.flush()

    @on_main_process
    def finish(self) -> None:
        """Close the file."""
        if self.writer is not None:
            with _saying_what_is_lost():
                super().finish()


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
