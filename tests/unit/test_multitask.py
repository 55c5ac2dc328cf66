"""Tasks, their losses and metrics, and the shares of a step that ranks get."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from sklearn.metrics import f1_score
from torch import Tensor, nn
from torch.nn import functional as F

from toolkit.bundled import load_task
from toolkit.multitask import (
    CLASSES,
    NUMBER,
    PAIR_TASKS,
    YES_OR_NO,
    Tasks,
    digit_pair,
    one_silo_each,
)
from toolkit.training import evaluate


@pytest.fixture(scope="module")
def pair() -> Tasks:
    return digit_pair(3)


def sources(images: Tensor) -> set[bytes]:
    """The digits that pairs (N, 1, 8, 16) are made of."""
    halves = images[:, 0].split(8, dim=2)
    return {half.numpy().tobytes() for column in halves for half in column}


def test_pairs_are_told_right(pair: Tasks) -> None:
    bunch = load_digits()
    digit_of = {
        (image / 16).astype(np.float32).tobytes(): int(digit)
        for image, digit in zip(bunch.images, bunch.target, strict=True)
    }
    images, left, right, total, parity, pixels = pair.silos[0][:500]
    assert images.shape[1:] == (1, 8, 16)
    for row in range(500):
        first, second = (digit_of[half.numpy().tobytes()] for half in images[row, 0].split(8, 1))
        assert (left[row], right[row], total[row]) == (first, second, first + second)
        assert parity[row] == (first * second) % 2
        assert float(pixels[row]) == pytest.approx(float((images[row] > 0.5).double().mean()))
    assert 0.15 < float(parity.double().mean()) < 0.35


def test_pairs_for_evaluation_are_of_other_images(pair: Tasks) -> None:
    train, evaluation = pair.silos[0][:][0], pair.evaluation[:]["inputs"]
    assert (len(train), len(evaluation)) == (4000, 1000)
    assert not sources(train) & sources(evaluation)
    assert set(pair.evaluation.column_names) == {"inputs", *PAIR_TASKS}


def test_seeds_give_other_pairs(pair: Tasks) -> None:
    assert torch.equal(digit_pair(3).silos[0][:][0], pair.silos[0][:][0])
    assert not torch.equal(digit_pair(4).silos[0][:][0], pair.silos[0][:][0])


@pytest.mark.parametrize("name", ["pair", "digits"])
def test_ranks_share_a_step(pair: Tasks, name: str) -> None:
    tasks = pair if name == "pair" else one_silo_each(load_task("digits", seed=3), ["h1", "h2"])
    window = [[5, 3, 8, 1, 9]] if name == "pair" else [[7], [2, 4, 6]]
    predict = tasks.build_model(3)
    whole = tasks.batch(window, 0, 1)
    parts = [tasks.batch(window, rank, 2) for rank in range(2)]
    assert sum(len(part.inputs) for part in parts) == sum(map(len, window)) == len(whole.inputs)
    expected = torch.stack(tasks.summed_losses(predict(whole.inputs), whole))
    found = [torch.stack(tasks.summed_losses(predict(part.inputs), part)) for part in parts]
    torch.testing.assert_close(sum(found), expected)
    assert tasks.num_labels(window) == ([5] * 5 if name == "pair" else [1, 3])


def test_losses_are_of_the_labelled_samples() -> None:
    tasks = one_silo_each(load_task("digits", seed=3), ["h1", "h2"])
    batch = tasks.batch([[7, 11], [2, 4, 6]], 0, 1)
    logits = tasks.build_model(3)(batch.inputs)
    (_, own), (_, donor) = tasks.silos[0][[7, 11]], tasks.silos[1][[2, 4, 6]]
    expected = [
        F.cross_entropy(logits["h1"][:2], own, reduction="sum"),
        F.cross_entropy(logits["h2"][2:], donor, reduction="sum"),
    ]
    assert torch.equal(torch.stack(tasks.summed_losses(logits, batch)), torch.stack(expected))


def test_kinds() -> None:
    torch.manual_seed(0)
    labels = torch.randint(2, (50,))
    outputs = torch.randn(50, 1)
    predictions = (outputs[:, 0] > 0).long()
    f1 = YES_OR_NO.metric(YES_OR_NO.sums(outputs, labels).tolist())
    assert f1 == pytest.approx(100 * f1_score(labels, predictions))
    assert YES_OR_NO.metric([0, 0, 0]) == 0.0
    loss = F.binary_cross_entropy(outputs[:, 0].sigmoid(), labels.float(), reduction="sum")
    torch.testing.assert_close(YES_OR_NO.summed_loss(outputs, labels), loss)
    squares = (outputs[:, 0] - labels).square()
    torch.testing.assert_close(NUMBER.summed_loss(outputs, labels), squares.sum())
    assert NUMBER.metric(NUMBER.sums(outputs, labels).tolist()) == pytest.approx(
        float(squares.mean())
    )
    logits = torch.tensor([[1.0, 2.0], [2.0, 1.0], [0.0, 1.0]])
    assert CLASSES.metric(CLASSES.sums(logits, torch.tensor([1, 0, 0])).tolist()) == pytest.approx(
        200 / 3
    )
    for kind in (CLASSES, YES_OR_NO, NUMBER):
        assert float(kind.summed_loss(outputs[:0], labels[:0])) == 0.0


class Told(nn.Module):
    """Reads the share of bright pixels off the images, and is wrong by 0.1; knows nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.wrong_by = nn.Parameter(torch.tensor(0.1))

    def forward(self, images: Tensor, names: tuple[str, ...]) -> dict[str, Tensor]:
        share = (images > 0.5).float().mean(dim=(1, 2, 3))[:, None]
        return dict.fromkeys(names, share + self.wrong_by)


def test_evaluation_by_kind(pair: Tasks) -> None:
    names = ("pixels", "parity")
    found = evaluate(Accelerator(cpu=True), Told(), pair.evaluation, names, 300, pair.kinds)
    odd = float((pair.evaluation[:]["parity"] == 1).double().mean())
    assert found["pixels"] == pytest.approx(0.01, rel=1e-4)
    assert found["parity"] == pytest.approx(100 * 2 * odd / (1 + odd))  # it always says yes
    assert pair.tagged(found).keys() == {"MSE/pixels", "F1/parity (%)"}
