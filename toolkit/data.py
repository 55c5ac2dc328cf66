"""Two silos of labelled images, and the order in which a job reads its silo.

A silo holds images and the labels of one head: the receiver's silo has labels for ``h1``, the
donor's for ``h2``. The bundled tasks are made of scikit-learn's 1,797 digits (8 x 8 pixels), so
that nothing is downloaded. For data of one's own see ``toolkit.silos``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import numpy.typing as npt
from accelerate import Accelerator, skip_first_batches
from accelerate.data_loader import BatchSamplerShard, DataLoaderShard, SeedableRandomSampler
from datasets import Array3D, Dataset, Features, Value
from sklearn.datasets import load_digits
from torch.utils.data import BatchSampler, TensorDataset

TASKS = ("digits", "overlap")
# In an evaluation set: this image has no label for this head.
NO_LABEL = -1

# digits: images with a label for h1 and for h2; the rest is for evaluation.
_NUM_DIGITS_H1, _NUM_DIGITS_H2 = 80, 1200
# overlap: source images, and what is composed of them, for h1, h2 and evaluation.
_OVERLAP_POOLS, _OVERLAP_PAIRS = (600, 600, 597), (2000, 2000, 1000)
_OVERLAP_SHIFT = 4  # pixels by which the second digit lies further right and further down

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """What the two jobs learn from.

    Attributes:
        name: of the task or the data set.
        image_shape: (C, H, W) of every image.
        num_classes: by head.
        train: by head, the silo with its labels: columns ``image`` (C, H, W), float32 in [0, 1],
            and one label column named like the head. A job holds its own silo only.
        evaluation: images of neither silo: columns ``image`` and one per head, ``NO_LABEL`` where
            an image has no label for that head.
    """

    name: str
    image_shape: tuple[int, int, int]
    num_classes: dict[str, int]
    train: dict[str, Dataset]
    evaluation: Dataset


def load_task(name: str, *, seed: int = 0) -> Task:
    """A bundled task.

    - ``digits``: ``h1`` tells the digit and has 80 labelled images; ``h2`` tells the pair of
      digits (0 or 1, 2 or 3, ...) and has 1,200. The donor's coarse labels improve ``h1``.
    - ``overlap``: two digits overlaid. ``h1`` tells the upper left one, ``h2`` the lower right
      one; each silo has 2,000 images.

    No source image is in two of receiver's silo, donor's silo and evaluation set.

    Args:
        name: ``digits`` or ``overlap``.
        seed: of the split. Both jobs must use the same one, else their silos and evaluation sets
            overlap.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in TASKS:
        raise ValueError(f"task {name!r} is unknown; choose one of {list(TASKS)}")
    bunch = load_digits()
    images = (bunch.images / 16.0).astype(np.float32)
    digits = bunch.target.astype(np.int64)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(digits))
    if name == "digits":
        parts = np.split(order, [_NUM_DIGITS_H1, _NUM_DIGITS_H1 + _NUM_DIGITS_H2])
        labels = {"h1": digits, "h2": digits // 2}
        samples = [
            (images[part, None], {head: column[part] for head, column in labels.items()})
            for part in parts
        ]
        num_classes = {"h1": 10, "h2": 5}
    else:
        pools = np.split(order, np.cumsum(_OVERLAP_POOLS)[:-1])
        samples = [
            _overlay(images, digits, rng.choice(pool, size=(num_pairs, 2)))
            for pool, num_pairs in zip(pools, _OVERLAP_PAIRS, strict=True)
        ]
        num_classes = {"h1": 10, "h2": 10}
    for head, size in num_classes.items():
        for _, columns in samples:
            check_labels(columns[head], size, head)
    (own_images, own), (donor_images, donor), (evaluation_images, evaluation) = samples
    return Task(
        name=name,
        image_shape=own_images.shape[1:],
        num_classes=num_classes,
        train={
            "h1": make_dataset(own_images, {"h1": own["h1"]}),
            "h2": make_dataset(donor_images, {"h2": donor["h2"]}),
        },
        evaluation=make_dataset(evaluation_images, evaluation),
    )


def _overlay(
    images: FloatArray, digits: IntArray, pairs: IntArray
) -> tuple[FloatArray, dict[str, IntArray]]:
    """Lay image ``pairs[i, 1]`` over ``pairs[i, 0]``, shifted to the lower right; sum, clipped."""
    size, shift = images.shape[1], _OVERLAP_SHIFT
    canvas = np.zeros((len(pairs), 1, size + shift, size + shift), dtype=np.float32)
    canvas[:, 0, :size, :size] = images[pairs[:, 0]]
    canvas[:, 0, shift:, shift:] += images[pairs[:, 1]]
    labels = {"h1": digits[pairs[:, 0]], "h2": digits[pairs[:, 1]]}
    return np.minimum(canvas, 1.0), labels


def make_dataset(images: FloatArray, labels: Mapping[str, FloatArray | IntArray]) -> Dataset:
    """A ``Dataset`` in this package's columns, giving torch tensors.

    Args:
        images: (N, C, H, W).
        labels: by head, (N,).
    """
    label_features = {head: Value(str(column.dtype)) for head, column in labels.items()}
    features = Features({"image": Array3D(images.shape[1:], "float32"), **label_features})
    columns: dict[str, Any] = {"image": list(images), **labels}
    return Dataset.from_dict(columns, features=features).with_format("torch")


def in_memory(dataset: Dataset, head: str) -> TensorDataset:
    """Pairs (image, label of ``head``) as tensors; N*C*H*W*4 bytes of memory.

    Decoding rows of a ``Dataset`` takes longer than a training step of a small model does.

    Args:
        dataset: columns ``image`` and ``head``.
        head: the label column.
    """
    columns = dataset.with_format("torch", columns=["image", head])[:]
    return TensorDataset(columns["image"], columns[head])


def check_labels(labels: Iterable[object], num_classes: int, head: str) -> None:
    """Refuse labels that are no class numbers: a loss would fail later, or train on nonsense.

    Args:
        labels: one per row.
        num_classes: of the head.
        head: for the message.

    Raises:
        ValueError: naming the first bad value, its row, the head, and what to do.
    """
    for row, label in enumerate(labels):
        if not isinstance(label, Integral) or not 0 <= int(label) < num_classes:
            raise ValueError(
                f"label {label!r} in row {row} is no class of head {head!r}, which has "
                f"{num_classes} classes: labels must be whole numbers from 0 to "
                f"{num_classes - 1}. Renumber the labels, or give the right --num_classes"
            )


def windows_per_epoch(
    num_samples: int, batch_size: int, gradient_accumulation_steps: int, num_processes: int
) -> int:
    """Optimizer steps per epoch of the job that ``window_indices`` describes."""
    num_batches = math.ceil(math.ceil(num_samples / batch_size) / num_processes)
    return math.ceil(num_batches / gradient_accumulation_steps)


def window_indices(
    num_samples: int,
    batch_size: int,
    gradient_accumulation_steps: int,
    num_processes: int,
    seed: int,
) -> Iterator[list[int]]:
    """The samples of every optimizer step of an Accelerate job, epoch after epoch, without end.

    The job is one with a prepared ``DataLoader(shuffle=True)``, ``even_batches`` (the default) and
    ``DataLoaderConfiguration(use_seedable_sampler=True, data_seed=seed)``. Its last window of an
    epoch may be short, as Accelerate synchronises at the end of a dataloader; with several ranks
    its last batches are filled up with samples from the start of the epoch, which are processed,
    and listed here, twice.

    Args:
        num_samples: rows of the dataset.
        batch_size: samples per rank and micro-step.
        gradient_accumulation_steps: micro-steps per optimizer step.
        num_processes: ranks.
        seed: the job's ``data_seed``.

    Yields:
        Dataset indices, of all ranks and micro-steps of one optimizer step.

    Raises:
        ValueError: if there are no samples.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    sampler = SeedableRandomSampler(range(num_samples), data_seed=seed)
    batches = BatchSampler(sampler, batch_size, drop_last=False)
    # Accelerate wraps the sampler for several processes only; a shard of one would be filled up.
    shards: list[BatchSampler] = [batches]
    if num_processes > 1:
        shards = [BatchSamplerShard(batches, num_processes, rank) for rank in range(num_processes)]
    for epoch in itertools.count():
        batches_by_rank = []
        for shard in shards:
            sampler.set_epoch(epoch)
            batches_by_rank.append(list(shard))
        for start in range(0, len(batches_by_rank[0]), gradient_accumulation_steps):
            window = slice(start, start + gradient_accumulation_steps)
            yield [
                index
                for rank_batches in batches_by_rank
                for batch in rank_batches[window]
                for index in batch
            ]


def endless_batches(
    accelerator: Accelerator, dataloader: DataLoaderShard, completed_steps: int
) -> Iterator[tuple[int, Any]]:
    """The micro-batches of a prepared dataloader, epoch after epoch, as if never interrupted.

    Args:
        accelerator: made with ``DataLoaderConfiguration(use_seedable_sampler=True)``, so that the
            order of an epoch follows from its number.
        dataloader: prepared.
        completed_steps: optimizer steps whose micro-batches are left out.

    Returns:
        Number of the micro-step, from 0 at the start of the training, and the batch; without end.

    Raises:
        ValueError: if the dataloader has no batch.
    """
    if len(dataloader) == 0:
        raise ValueError("no full batch: give a smaller --per_device_train_batch_size")
    accumulation = accelerator.gradient_accumulation_steps
    steps_per_epoch = math.ceil(len(dataloader) / accumulation)
    epoch, steps_done = divmod(completed_steps, steps_per_epoch)
    return _batches_from(dataloader, epoch, steps_done * accumulation)


def _batches_from(
    dataloader: DataLoaderShard, epoch: int, skipped: int
) -> Iterator[tuple[int, Any]]:
    while True:
        dataloader.set_epoch(epoch)
        batches = skip_first_batches(dataloader, skipped) if skipped else dataloader
        yield from enumerate(batches, start=epoch * len(dataloader) + skipped)
        epoch, skipped = epoch + 1, 0
