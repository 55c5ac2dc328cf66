"""Validation images with what a model says of them, the wrong answers first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image, ImageDraw
from torch import Tensor, nn

from toolkit.data import NO_LABEL, Task, to_dtype
from toolkit.metrics import PatientTensorBoard

LOOKED_AT = 256  # first rows of the validation data that are predicted
TILES, COLUMNS = 12, 3  # which TensorBoard shows legibly
SIDE, MARGIN, LINE = 96, 20, 14  # pixels: an image's longer side; around it; a line below it


@torch.no_grad()
def record_predictions(
    accelerator: Accelerator,
    model: nn.Module,
    task: Task,
    heads: Sequence[str],
    step: int,
) -> None:
    """Show TensorBoard some validation images, if the task has images. A collective.

    Args:
        accelerator: of the model; without TensorBoard nothing happens.
        model: prepared or not; its training mode is restored.
        task: whose validation data are looked at.
        heads: to ask.
        step: of the curves.
    """
    dataset = task.evaluation
    boards = [t for t in accelerator.trackers if isinstance(t, PatientTensorBoard)]
    if not boards or len(dataset) == 0 or len(dataset[[0]]["inputs"].shape) != 4:
        return
    rows = dataset[list(range(min(LOOKED_AT, len(dataset))))]
    parameter = next(model.parameters())
    was_training = model.training
    model.eval()
    outputs = model(to_dtype(rows["inputs"].to(parameter.device), parameter.dtype), heads)
    model.train(was_training)
    if not accelerator.is_main_process:
        return
    answers = {head: outputs[head].argmax(dim=-1).cpu() for head in heads}
    labels = {head: rows[head] for head in heads}
    picture = draw_predictions(rows["inputs"], labels, answers, task.class_names_of(heads))
    pixels = np.asarray(picture).transpose(2, 0, 1)[None]
    for board in boards:
        board.log_images({"validation/predictions": pixels}, step)


def draw_predictions(
    images: Tensor,
    labels: Mapping[str, Tensor],
    answers: Mapping[str, Tensor],
    class_names: Mapping[str, Sequence[str]],
) -> Image.Image:
    """Lay images out in a grid, those with the most wrong answers first.

    Args:
        images: (N, C, H, W) in [0, 1], with one channel or three.
        labels: by head, (N,), ``NO_LABEL`` where there is none.
        answers: by head, (N,): classes as predicted.
        class_names: by head; a class without has its number.

    Returns:
        At most ``TILES`` images; below each a line for each head, red where it is wrong.
    """
    wrong = {h: (answers[h] != labels[h]) & (labels[h] != NO_LABEL) for h in answers}
    num_wrong = torch.stack([*wrong.values()]).sum(dim=0)
    chosen = num_wrong.argsort(descending=True, stable=True)[:TILES].tolist()
    width, height = SIDE + 2 * MARGIN, SIDE + MARGIN // 2 + LINE * len(answers)
    num_rows = -(-len(chosen) // COLUMNS)
    picture = Image.new("RGB", (COLUMNS * width, num_rows * height), "white")
    pen = ImageDraw.Draw(picture)
    for place, number in enumerate(chosen):
        left, top = place % COLUMNS * width, place // COLUMNS * height
        pixels = (images[number].clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()
        image = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
        scale = SIDE / max(image.size)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        picture.paste(image.resize(size, Image.Resampling.NEAREST), (left + MARGIN, top))
        for line, head in enumerate(answers):
            is_wrong, names = bool(wrong[head][number]), class_names.get(head, ())
            text = f"{head}: {_name(answers[head][number], names)}"
            if is_wrong:
                text += f", is {_name(labels[head][number], names)}"
            at = (left + MARGIN // 2, top + SIDE + LINE * line)
            pen.text(at, text, fill="red" if is_wrong else "black")
    return picture


def _name(label: Tensor, names: Sequence[str]) -> str:
    number = int(label)
    return names[number] if number < len(names) else str(number)
