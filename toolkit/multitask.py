"""Several tasks for one backbone: what each is judged by, whose samples have which labels.

- Heads of a bridge: each sample has a label for one of them, as in its jobs.
- ``pair``: two of scikit-learn's digits side by side; every sample has labels for five tasks, of
  which some are classes and some are numbers, whose losses differ in size and disagree.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional
from torch.utils.data import TensorDataset

from toolkit.data import FloatArray, IntArray, Task, in_memory, make_dataset
from toolkit.models import MultiHeadModel, build_lenet

PAIR, PAIR_TASKS = "pair", ("left", "right", "sum", "parity", "pixels")
# Source images for training, of which pairs are drawn; evaluation has the rest.
_PAIR_POOL, _NUM_PAIRS = 1200, (4000, 1000)
_ACTIVE = 0.5  # above this a pixel counts as active


@dataclass(frozen=True, slots=True)
class Kind:
    """What a task's predictions are trained and judged by.

    Attributes:
        tag: of the metric, with a place for the task's name.
        summed_loss: of predictions (N, K) and labels (N,), the sum over samples; 0 if N is 0.
        sums: of the same, what the metric is made of, added up over samples: (S,) in float64 with
            S at most 3.
        metric: from these sums over all samples.
    """

    tag: str
    summed_loss: Callable[[Tensor, Tensor], Tensor]
    sums: Callable[[Tensor, Tensor], Tensor]
    metric: Callable[[Sequence[float]], float]


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits, labels, reduction="sum")


def _binary_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    targets = labels.to(logits.dtype)
    return functional.binary_cross_entropy_with_logits(logits[:, 0], targets, reduction="sum")


def _squared_error(predictions: Tensor, labels: Tensor) -> Tensor:
    return functional.mse_loss(predictions[:, 0], labels.to(predictions.dtype), reduction="sum")


def _correct(logits: Tensor, labels: Tensor) -> Tensor:
    return _sums(logits.argmax(dim=1) == labels, torch.ones_like(labels))


def _positives(logits: Tensor, labels: Tensor) -> Tensor:
    found, wanted = logits[:, 0] > 0, labels == 1
    return _sums(found & wanted, found, wanted)


def _errors(predictions: Tensor, labels: Tensor) -> Tensor:
    errors = predictions[:, 0].double() - labels.double()
    return _sums(errors.square(), torch.ones_like(labels))


def _sums(*columns: Tensor) -> Tensor:
    return torch.stack([column.double().sum() for column in columns])


def _f1(sums: Sequence[float]) -> float:
    both, found, wanted = sums[:3]
    return 100.0 * 2.0 * both / (found + wanted) if found + wanted else 0.0


CLASSES = Kind("accuracy/{} (%)", _cross_entropy, _correct, lambda sums: 100.0 * sums[0] / sums[1])
YES_OR_NO = Kind("F1/{} (%)", _binary_cross_entropy, _positives, _f1)
NUMBER = Kind("MSE/{}", _squared_error, _errors, lambda sums: sums[0] / sums[1])


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """One rank's share of a step.

    Attributes:
        inputs: of N samples, on the CPU.
        rows: by task, where the samples with labels for it are; maybe nowhere.
        labels: by task, (n,) for these.
    """

    inputs: Tensor
    rows: Mapping[str, slice]
    labels: Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Tasks:
    """Tasks that train together.

    Attributes:
        kinds: by task, in the order in which results are given.
        silos: training data: inputs, then labels for the tasks that ``silo_tasks`` names.
        silo_tasks: for each silo, the tasks that its samples have labels for.
        evaluation: columns ``inputs`` and one per task.
        build_model: makes backbone and heads from a seed.
    """

    kinds: Mapping[str, Kind]
    silos: Sequence[TensorDataset]
    silo_tasks: Sequence[Sequence[str]]
    evaluation: Dataset
    build_model: Callable[[int], MultiHeadModel]

    @property
    def names(self) -> tuple[str, ...]:
        """Of the tasks."""
        return tuple(self.kinds)

    def num_labels(self, window: Sequence[Sequence[int]]) -> list[int]:
        """For each task, the samples of a step that have a label for it; arguments as below."""
        return [
            len(rows) for rows, names in zip(window, self.silo_tasks, strict=True) for _ in names
        ]

    def batch(self, window: Sequence[Sequence[int]], rank: int, num_processes: int) -> Batch:
        """A rank's share of a step's samples; any part of it may be empty.

        Args:
            window: for each silo, row numbers.
            rank: of this process.
            num_processes: that share them.
        """
        inputs: list[Tensor] = []
        rows: dict[str, slice] = {}
        labels: dict[str, Tensor] = {}
        start = 0
        for silo, names, wanted in zip(self.silos, self.silo_tasks, window, strict=True):
            part, *columns = silo[wanted[rank::num_processes]]
            inputs.append(part)
            rows |= dict.fromkeys(names, slice(start, start + len(part)))
            labels |= dict(zip(names, columns, strict=True))
            start += len(part)
        return Batch(inputs=torch.cat(inputs), rows=rows, labels=labels)

    def summed_losses(self, predictions: Mapping[str, Tensor], batch: Batch) -> list[Tensor]:
        """For each task, the sum of the losses of the samples that have a label for it."""
        return [
            kind.summed_loss(
                predictions[name][batch.rows[name]],
                batch.labels[name].to(predictions[name].device),
            )
            for name, kind in self.kinds.items()
        ]

    def tagged(self, values: Mapping[str, float]) -> dict[str, float]:
        """Metrics by task as metrics by tag."""
        return {self.kinds[name].tag.format(name): value for name, value in values.items()}


def one_silo_each(task: Task, heads: Sequence[str]) -> Tasks:
    """These heads, each with a silo of its own.

    Raises:
        ValueError: for a head that the data have no classes for.
    """
    num_classes = task.classes_of(heads)
    return Tasks(
        kinds=dict.fromkeys(heads, CLASSES),
        silos=[in_memory(task.train[head], head) for head in heads],
        silo_tasks=[(head,) for head in heads],
        evaluation=task.evaluation,
        build_model=lambda seed: task.build_model(num_classes, seed=seed),
    )


def digit_pair(seed: int) -> Tasks:
    """Two digits side by side, in images of 8 x 16 pixels, and five things to tell about them.

    ``left`` and ``right`` are the digits, ``sum`` their sum (a number, from 0 to 18), ``parity``
    whether their product is odd, ``pixels`` the share of pixels above one half. No source image is
    used for both training (4,000 pairs of 1,200 images) and evaluation (1,000 pairs of 597).

    The benchmark of Javaloy and Valera, RotoGrad: Gradient Homogenization in Multitask Learning,
    arXiv 2103.02631, with scikit-learn's digits in place of MNIST's.

    Args:
        seed: of the split and the pairs.
    """
    from sklearn.datasets import load_digits  # slow to import, and not needed for --help

    bunch = load_digits()
    images = (bunch.images / 16.0).astype(np.float32)
    digits = bunch.target.astype(np.int64)
    rng = np.random.default_rng(seed)
    pools = np.split(rng.permutation(len(digits)), [_PAIR_POOL])
    train, evaluation = (
        _side_by_side(images, digits, rng.choice(pool, size=(num_pairs, 2)))
        for pool, num_pairs in zip(pools, _NUM_PAIRS, strict=True)
    )
    kinds = dict(zip(PAIR_TASKS, (CLASSES, CLASSES, NUMBER, YES_OR_NO, NUMBER), strict=True))
    shape = train[0].shape[1:]
    out_features = {name: 10 if kind is CLASSES else 1 for name, kind in kinds.items()}
    return Tasks(
        kinds=kinds,
        silos=[TensorDataset(*map(torch.from_numpy, [train[0], *train[1].values()]))],
        silo_tasks=[tuple(kinds)],
        evaluation=make_dataset(*evaluation),
        build_model=partial(build_lenet, shape, out_features),
    )


def _side_by_side(
    images: FloatArray, digits: IntArray, pairs: IntArray
) -> tuple[FloatArray, dict[str, FloatArray | IntArray]]:
    canvas = np.concatenate([images[pairs[:, 0]], images[pairs[:, 1]]], axis=2)[:, None]
    left, right = digits[pairs[:, 0]], digits[pairs[:, 1]]
    labels: dict[str, FloatArray | IntArray] = {"left": left, "right": right, "sum": left + right}
    labels["parity"] = (left * right) % 2
    labels["pixels"] = (canvas > _ACTIVE).mean(axis=(1, 2, 3)).astype(np.float32)
    return canvas, labels
