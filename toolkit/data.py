"""Silos of labelled samples, and the order in which a job reads its silo.

A silo holds samples and the labels of one head: the receiver's silo has labels for ``h1``, a
donor's for ``h2`` or ``h3``. For the bundled tasks see ``toolkit.bundled``, for data of one's own
``toolkit.silos``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Protocol

import datasets
import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.data_loader import BatchSamplerShard, DataLoaderShard, SeedableRandomSampler
from datasets import Array3D, ClassLabel, Dataset, Features, Value
from torch import Tensor
from torch.utils.data import BatchSampler, TensorDataset

from toolkit.models import MultiHeadModel

# Those that data can have labels for: the receiver's own, then the donors'.
HEADS = ("h1", "h2", "h3")
# In an evaluation set: this sample has no label for this head.
NO_LABEL = -1

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]


class ModelBuilder(Protocol):
    """Makes the model of a task."""

    def __call__(self, num_classes: dict[str, int], *, seed: int) -> MultiHeadModel:
        """A backbone, and a head for each entry of ``num_classes``; the same for the same seed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """What the two jobs learn from.

    Attributes:
        name: of the task or the data set.
        build_model: makes a backbone for these inputs, and heads.
        num_classes: by head.
        train: by head, the silo with its labels: columns ``inputs``, see :func:`make_dataset`, and
            one label column named like the head. A job holds its own silo only.
        evaluation: samples of neither silo: columns ``inputs`` and one per head, ``NO_LABEL``
            where a sample has no label for that head.
    """

    name: str
    build_model: ModelBuilder
    num_classes: dict[str, int]
    train: dict[str, Dataset]
    evaluation: Dataset

    def class_names_of(self, heads: Collection[str]) -> dict[str, list[str]]:
        """By head, the names of its classes, for those of these heads whose data name them."""
        features = {head: self.train[head].features[head] for head in heads if head in self.train}
        return {
            head: list(feature.names)
            for head, feature in features.items()
            if isinstance(feature, ClassLabel)
        }

    def classes_of(self, heads: Collection[str]) -> dict[str, int]:
        """``num_classes`` of these heads only.

        Raises:
            ValueError: for a head that the data have no classes for.
        """
        if absent := [head for head in heads if head not in self.num_classes]:
            raise ValueError(
                f"{self.name!r} has classes for {', '.join(self.num_classes)}, none for "
                f"{absent[0]}: take another --task, or give --num_classes a number for each head"
            )
        return {head: self.num_classes[head] for head in heads}


def make_dataset(
    inputs: FloatArray | IntArray,
    labels: Mapping[str, FloatArray | IntArray],
    class_names: Mapping[str, Sequence[str]] | None = None,
) -> Dataset:
    """A ``Dataset`` in this package's columns, giving torch tensors.

    Args:
        inputs: images (N, C, H, W), float32 in [0, 1]; or token numbers (N, T), int64, with
            ``toolkit.models.PADDING`` after the end of a text.
        labels: by head, (N,).
        class_names: by head, where the classes have names.
    """
    kind: Any = Array3D(inputs.shape[1:], "float32")
    if inputs.ndim == 2:
        kind = datasets.Sequence(Value("int64"), length=inputs.shape[1])
    label_features: dict[str, Any] = {
        head: Value(str(column.dtype)) for head, column in labels.items()
    }
    for head, names in (class_names or {}).items():
        label_features[head] = ClassLabel(names=list(names))
    columns: dict[str, Any] = {"inputs": list(inputs), **labels}
    features = Features({"inputs": kind, **label_features})
    return Dataset.from_dict(columns, features=features).with_format("torch")


def in_memory(dataset: Dataset, head: str) -> TensorDataset:
    """Pairs (inputs, label of ``head``) as tensors: images take N*C*H*W*4 bytes, texts N*T*8.

    Decoding rows of a ``Dataset`` takes longer than a training step of a small model does.

    Args:
        dataset: columns ``inputs`` and ``head``.
        head: the label column.
    """
    columns = dataset.with_format("torch", columns=["inputs", head])[:]
    return TensorDataset(columns["inputs"], columns[head])


def take_shard(silo: Dataset, index: int, num_shards: int) -> Dataset:
    """Every ``num_shards``-th row, from ``index`` on.

    Data are often sorted by class: blocks of rows would give each donor classes of its own.

    Raises:
        ValueError: if there is no such row.
    """
    if index >= len(silo):
        raise ValueError(f"shard {index}/{num_shards} is empty: there are {len(silo)} rows")
    return silo.shard(num_shards=num_shards, index=index, contiguous=False)


def to_dtype(inputs: Tensor, dtype: torch.dtype) -> Tensor:
    """Images in the model's dtype; token numbers as they are."""
    return inputs.to(dtype) if inputs.is_floating_point() else inputs


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


def shard_windows(
    num_shards: int,
    num_samples: int,
    batch_size: int,
    gradient_accumulation_steps: int,
    num_processes: int,
    seed: int,
) -> Iterator[list[int]]:
    """What :func:`window_indices` gives for as many jobs, each with its :func:`take_shard`.

    Args:
        num_shards: as many jobs there are; all are alike.
        num_samples: rows of the whole silo; the other arguments are those of one job.

    Yields:
        Dataset indices in the whole silo, of all jobs' optimizer step.

    Raises:
        ValueError: if a shard is empty.
    """
    sizes = [len(range(index, num_samples, num_shards)) for index in range(num_shards)]
    job = (batch_size, gradient_accumulation_steps, num_processes, seed)
    for windows in zip(*(window_indices(size, *job) for size in sizes), strict=True):
        yield [index + num_shards * row for index, window in enumerate(windows) for row in window]


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
