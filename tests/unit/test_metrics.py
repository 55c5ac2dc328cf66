"""What is shown in TensorBoard beside scalars."""

from __future__ import annotations

import torch

from toolkit.metrics import image_grid


def test_that_a_grid_keeps_rows_and_columns() -> None:
    images = torch.zeros(2, 3, 4, 4)
    images[0, 2], images[1, 0] = 0.5, 7.0

    grid = image_grid(images, zoom=2, gap=1)

    assert grid.shape == (1, 20, 30)
    cells = grid.view(2, 10, 3, 10)
    assert cells[:, 5, :, 5].tolist() == [[0.0, 0.0, 0.5], [1.0, 0.0, 0.0]]
    assert bool((cells[:, [0, -1]] == 1).all())
    assert bool((cells[..., [0, -1]] == 1).all())
