"""What recipes write to TensorBoard beside plain ``accelerator.log`` scalars."""

from __future__ import annotations

import atexit
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional
from torch.utils.tensorboard.summary import hparams


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
    """
    accelerator.project_configuration.logging_dir = str(output_dir.parent)
    accelerator.init_trackers(output_dir.name)
    if not accelerator.is_main_process or not accelerator.trackers:
        return
    plain = {
        name: value if isinstance(value, (bool, int, float, str)) else str(value)
        for name, value in config.items()
    }
    writer = accelerator.get_tracker("tensorboard", unwrap=True)
    atexit.register(writer.flush)  # a job that is interrupted leaves all its curves
    rows = [f"| `{name}` | `{value}` |" for name, value in plain.items()]
    writer.add_text("configuration", "\n".join(["| setting | value |", "|---|---|", *rows]))
    for summary in hparams(plain, dict.fromkeys(metrics, 0.0)):
        writer.file_writer.add_summary(summary)
    writer.flush()


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
