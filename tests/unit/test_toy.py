"""The paper's toy problem."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from toolkit.toy import AUTHORS_SEED, LEAST_LOSS, OPTIMA, draw_trajectories, toy_loss, train_toy


def test_loss_is_least_and_finite_at_the_optimum() -> None:
    at = torch.tensor([OPTIMA[0]], requires_grad=True)
    loss = toy_loss(at, OPTIMA[0])
    loss.backward()
    assert float(loss.detach()) == LEAST_LOSS
    assert at.grad is not None
    assert bool(at.grad.isfinite().all())
    away = torch.tensor([[0.7, -2.0]])
    u, v = 0.7 - 1.5, -2.0 - 1.5
    expected = abs(u) + abs(v) - np.sin(3 * u) / u - np.sin(3 * v) / v
    assert float(toy_loss(away, OPTIMA[0])) == pytest.approx(expected, rel=1e-5)


def test_that_no_single_point_serves_both() -> None:
    run = train_toy("vanilla", AUTHORS_SEED)
    assert run.losses == pytest.approx((-5.72, 5.36), abs=0.01)
    assert torch.equal(run.paths[:, 0], run.paths[:, 1])
    state = torch.get_rng_state()
    again = train_toy("rotograd", 1, init="random", num_steps=5)
    assert torch.equal(torch.get_rng_state(), state)
    assert again.paths.shape == (6, 2, 2)
    assert again.mean_loss == sum(again.losses) / 2


def test_that_rotations_let_both_descend() -> None:
    start, end = (train_toy("rotograd", 6, num_steps=steps) for steps in (0, 150))
    assert all(after < before - 0.5 for before, after in zip(start.losses, end.losses, strict=True))


def test_drawing() -> None:
    runs = [train_toy("rotate", seed, num_steps=3) for seed in (0, 1)]
    image = draw_trajectories([("first", [("a", runs[0]), ("b", runs[1])])])
    blue = (np.asarray(image) == (31, 97, 190)).all(axis=2)
    middle = blue.shape[1] // 2
    assert int(blue[:, :middle].sum()) > 20
    assert int(blue[:, middle:].sum()) > 20
