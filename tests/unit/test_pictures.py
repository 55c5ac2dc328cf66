"""Validation images with predictions."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from toolkit.data import NO_LABEL
from toolkit.pictures import COLUMNS, LINE, MARGIN, SIDE, TILES, draw_predictions

WIDTH, HEIGHT = SIDE + 2 * MARGIN, SIDE + MARGIN // 2 + 2 * LINE


def tile(picture: Image.Image, place: int) -> NDArray[np.uint8]:
    row, column = divmod(place, COLUMNS)
    pixels = np.asarray(picture)
    found: NDArray[np.uint8] = pixels[row * HEIGHT :, column * WIDTH :][:HEIGHT, :WIDTH]
    return found


def is_red(pixels: NDArray[np.uint8]) -> bool:
    return bool((pixels[..., 0] > pixels[..., 1]).any())


def test_that_the_most_wrong_come_first() -> None:
    number = TILES + 5
    images = torch.linspace(0, 1, number)[:, None, None, None].expand(-1, 1, 8, 8)
    labels = {"h1": torch.zeros(number, dtype=torch.int64), "h2": torch.full((number,), NO_LABEL)}
    answers = {head: torch.zeros(number, dtype=torch.int64) for head in labels}
    labels["h2"][7] = 0
    answers["h1"][[4, 7]] = 1
    answers["h2"][7] = 1

    picture = draw_predictions(images, labels, answers, {"h1": ["zero", "one"]})

    assert picture.size == (COLUMNS * WIDTH, -(-TILES // COLUMNS) * HEIGHT)
    greys = [int(tile(picture, place)[SIDE // 2, WIDTH // 2, 0]) for place in range(TILES)]
    order = [7, 4, *(i for i in range(number) if i not in (4, 7))][:TILES]
    assert greys == [int(images[i, 0, 0, 0] * 255) for i in order]
    lines = slice(SIDE, SIDE + LINE), slice(SIDE + LINE, SIDE + 2 * LINE)
    red = [[is_red(tile(picture, place)[line]) for line in lines] for place in (0, 1, 2)]
    assert red == [[True, True], [True, False], [False, False]], "no label is no mistake"


def test_colours_and_shapes() -> None:
    images = torch.zeros(1, 3, 4, 2)
    images[0, 1] = 1.0
    zero = {"h1": torch.zeros(1, dtype=torch.int64)}
    pixels = np.asarray(draw_predictions(images, zero, zero, {}))
    assert pixels[SIDE // 2, MARGIN + SIDE // 4].tolist() == [0, 255, 0]
    assert pixels[SIDE // 2, MARGIN + 3 * SIDE // 4].tolist() == [255, 255, 255], "half as wide"


def test_that_a_head_may_have_more_classes_than_names() -> None:
    images = torch.zeros(1, 1, 8, 8)
    labels, answers = ({"h1": torch.tensor([number])} for number in (0, 2))
    named = draw_predictions(images, labels, answers, {"h1": ["zero", "one"]})
    assert named.tobytes() == draw_predictions(images, labels, answers, {"h1": ["zero"]}).tobytes()
    other = draw_predictions(images, labels, answers, {"h1": ["zero", "one", "two"]})
    assert named.tobytes() != other.tobytes()
