"""The toy problem of the RotoGrad paper: two tasks that want one pair of features elsewhere.

A small network sees one input and gives z of two numbers. Task k has the loss

    phi(r - c_k),  phi(u) = sum_i |u_i| - sin(3 u_i) / u_i,  c_1 = (1.5, 1.5) = -c_2

of r = z, or of r = R_k z with a rotation. phi is 0 in the mean of many valleys and -6 at 0 only.
Without rotations no z serves both tasks; with them, any z of the optimum's length does.

Source: Javaloy and Valera, RotoGrad: Gradient Homogenization in Multitask Learning,
arXiv 2103.02631; sizes and rates are those of the example in the authors' repository.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from toolkit.rotograd import RotateOnly, RotoGrad, VanillaMTL

AUTHORS_SEED = 5  # with which the authors' example shows RotoGrad succeed
OPTIMA = ((1.5, 1.5), (-1.5, -1.5))
LEAST_LOSS = -6.0
NUM_STEPS = 400
_LEARNING_RATE, _LEARNING_RATE_ROTATION = 1e-3, 0.05  # of SGD, of Adam
_HIDDEN_SIZE = 10
# The plot: its panels' size in pixels, and what of the plane they show.
_PANEL, _MARGIN, _EXTENT = 260, 26, 3.6
_COLOURS = ((214, 69, 65), (31, 97, 190))

ToyMethod = Literal["vanilla", "rotate", "rotograd"]
Init = Literal["identity", "random"]


@dataclass(frozen=True, slots=True)
class ToyRun:
    """One training.

    Attributes:
        losses: of both tasks at its end.
        paths: (steps + 1, 2, 2), what each task saw of the features: step, task, coordinate.
    """

    losses: tuple[float, float]
    paths: Tensor

    @property
    def mean_loss(self) -> float:
        """Of the tasks; -6 where both have found their optimum."""
        return sum(self.losses) / 2


def toy_loss(rows: Tensor, optimum: tuple[float, float]) -> Tensor:
    """phi, the mean over rows (N, 2)."""
    away = rows - rows.new_tensor(optimum)
    return (away.abs() - 3.0 * torch.sinc(3.0 * away / math.pi)).sum(dim=1).mean()


def train_toy(
    method: ToyMethod, seed: int, *, init: Init = "identity", num_steps: int = NUM_STEPS
) -> ToyRun:
    """Train once; the global random state is left alone.

    Args:
        method: how the tasks' gradients meet. As in the authors' example, losses are divided by
            their first value where there are rotations.
        seed: of the network's weights, and of the first rotations if they are random.
        init: what rotations begin with.
        num_steps: of gradient descent.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = nn.Sequential(nn.Linear(2, _HIDDEN_SIZE), nn.ReLU(), nn.Linear(_HIDDEN_SIZE, 2))
        heads = [nn.Identity(), nn.Identity()]
        model: VanillaMTL
        if method == "vanilla":
            model = VanillaMTL(backbone, heads)
        else:
            kind = {"rotate": RotateOnly, "rotograd": RotoGrad}[method]
            model = kind(backbone, heads, 2, init=init, normalize_losses=True)
    network, *rotations = model.param_groups(_LEARNING_RATE, _LEARNING_RATE_ROTATION)
    optimizers: list[torch.optim.Optimizer] = [torch.optim.SGD([network])]
    optimizers += [torch.optim.Adam([group]) for group in rotations]
    inputs, paths = torch.zeros(1, 2), []
    for step in range(num_steps + 1):
        rotated = model(inputs)
        paths.append(torch.cat(rotated).detach())
        losses = [toy_loss(rows, optimum) for rows, optimum in zip(rotated, OPTIMA, strict=True)]
        if step < num_steps:
            model.backward(losses)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    first, second = (float(loss.detach()) for loss in losses)
    return ToyRun((first, second), torch.stack(paths))


def draw_trajectories(rows: Sequence[tuple[str, Sequence[tuple[str, ToyRun]]]]) -> Image.Image:
    """What each task saw of the features on its way, over the landscapes of both losses.

    Task 1 is red, task 2 blue: its loss is dark where it is low, a ring is where it began, a dot
    where it ended, a cross its optimum.

    Args:
        rows: a title, and panels of it, each with a title of its own.
    """
    columns = max(len(panels) for _, panels in rows)
    cell = _PANEL + _MARGIN
    image = Image.new("RGB", (columns * cell + _MARGIN, len(rows) * (cell + _MARGIN)), "white")
    draw = ImageDraw.Draw(image)
    landscape = _landscape()
    for row, (title, panels) in enumerate(rows):
        top = row * (cell + _MARGIN)
        draw.text((_MARGIN, top + 6), title, fill="black")
        for column, (name, run) in enumerate(panels):
            corner = (_MARGIN + column * cell, top + 2 * _MARGIN)
            losses = ", ".join(f"{loss:.2f}" for loss in run.losses)
            draw.text((corner[0], corner[1] - 16), f"{name}: {losses}", fill="black")
            image.paste(landscape, corner)
            for task, colour in enumerate(_COLOURS):
                _draw_path(draw, run.paths[:, task], OPTIMA[task], colour, corner)
    return image


def _landscape() -> Image.Image:
    """Both losses at every point of the plane: the lower, the darker."""
    axis = torch.linspace(-_EXTENT, _EXTENT, _PANEL)
    points = torch.stack(torch.meshgrid(axis, axis.flip(0), indexing="xy"), dim=-1).view(-1, 1, 2)
    shades = []
    for optimum in OPTIMA:
        away = points[:, 0] - points.new_tensor(optimum)
        loss = (away.abs() - 3.0 * torch.sinc(3.0 * away / math.pi)).sum(dim=1)
        shades.append(((loss - LEAST_LOSS) / -LEAST_LOSS / 2).clamp(0, 1))
    first, second = shades
    # Red is what the second loss lets through, blue what the first does.
    pixels = torch.stack([0.55 + 0.45 * second, 0.4 + 0.3 * (first + second), 0.55 + 0.45 * first])
    pixels = (pixels.view(3, _PANEL, _PANEL).permute(1, 2, 0) * 255).byte()
    return Image.fromarray(pixels.numpy())


def _draw_path(
    draw: ImageDraw.ImageDraw,
    path: Tensor,
    optimum: tuple[float, float],
    colour: tuple[int, int, int],
    corner: tuple[int, int],
) -> None:
    def pixel(point: Sequence[float]) -> tuple[float, float]:
        right, up = (min(max(value / _EXTENT, -1.0), 1.0) for value in point)
        return corner[0] + (1 + right) * _PANEL / 2, corner[1] + (1 - up) * _PANEL / 2

    points = [pixel(point) for point in path.tolist()]
    draw.line(points, fill=colour, width=2, joint="curve")
    (x, y), (end_x, end_y), (goal_x, goal_y) = points[0], points[-1], pixel(optimum)
    draw.ellipse((x - 4, y - 4, x + 4, y + 4), outline=colour, width=2)
    draw.ellipse((end_x - 4, end_y - 4, end_x + 4, end_y + 4), fill=colour)
    for sign in (-1, 1):
        draw.line((goal_x - 5, goal_y - 5 * sign, goal_x + 5, goal_y + 5 * sign), fill="black")
