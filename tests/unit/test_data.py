"""Tasks, labels, and the order of samples against Accelerate's own dataloaders."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import numpy as np
import pytest
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.data_loader import prepare_data_loader
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from toolkit.data import (
    Task,
    check_labels,
    in_memory,
    load_task,
    window_indices,
    windows_per_epoch,
)

SIZES = [(83, 16, 1), (83, 16, 3), (80, 16, 2), (5, 8, 2), (9, 2, 4)]


def rows(task: Task) -> list[Tensor]:
    """All images of receiver's silo, donor's silo and evaluation set."""
    datasets = (task.train["h1"], task.train["h2"], task.evaluation)
    return [dataset[:]["image"] for dataset in datasets]


@pytest.mark.parametrize("name", ["digits", "overlap"])
def test_columns(name: str) -> None:
    task = load_task(name)
    assert task.train["h1"].column_names == ["image", "h1"]
    assert task.train["h2"].column_names == ["image", "h2"]
    assert task.evaluation.column_names == ["image", "h1", "h2"]
    for images in rows(task):
        assert images.shape[1:] == task.image_shape
        assert images.dtype == torch.float32
        assert float(images.min()) == 0.0
        assert float(images.max()) == 1.0
    for head, num_classes in task.num_classes.items():
        assert set(task.evaluation[:][head].tolist()) == set(range(num_classes))


def test_digits_uses_every_source_image_once() -> None:
    used = torch.cat(rows(load_task("digits"))).flatten(1).double().numpy() * 16
    expected = load_digits().data
    assert sorted(map(tuple, used.tolist())) == sorted(map(tuple, expected.tolist()))


def test_overlap_shares_no_source_image() -> None:
    # Rows of the upper left digit that the other one does not cover tell which image it was.
    seen = [
        {image[0, :4, :8].numpy().tobytes() for image in part}
        for part in rows(load_task("overlap"))
    ]
    everything = load_digits().images[:, :4] / 16
    ambiguous = {
        image.astype(np.float32).tobytes()
        for image, count in zip(*np.unique(everything, axis=0, return_counts=True), strict=True)
        if count > 1
    }
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert len(seen[a]) > 400
        assert not (seen[a] & seen[b]) - ambiguous


def test_split_follows_the_seed() -> None:
    first, same, other = (load_task("digits", seed=seed) for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(rows(first), rows(same), strict=True))
    assert not torch.equal(rows(first)[0], rows(other)[0])


def test_unknown_task() -> None:
    with pytest.raises(ValueError, match="'mnist' is unknown; choose one of"):
        load_task("mnist")


def test_in_memory_keeps_rows() -> None:
    dataset = load_task("digits").train["h1"]
    images, labels = in_memory(dataset, "h1")[[7, 2]]
    assert torch.equal(images, dataset[[7, 2]]["image"])
    assert torch.equal(labels, dataset[[7, 2]]["h1"])


@pytest.mark.parametrize("bad", [5, -1, 1.0, None, "2"])
def test_check_labels_names_row_head_and_remedy(bad: object) -> None:
    check_labels([0, np.int64(4), 2], 5, "h2")
    with pytest.raises(ValueError, match=r"in row 2 .* head 'h2'.* from 0 to 4.*--num_classes"):
        check_labels([0, np.int64(4), bad], 5, "h2")


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    accelerator = Accelerator(
        cpu=True,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=11),
    )
    yield accelerator
    accelerator.free_memory()


@pytest.mark.parametrize(("num_samples", "batch_size", "accumulation"), SIZES)
def test_windows_of_one_process(
    accelerator: Accelerator, num_samples: int, batch_size: int, accumulation: int
) -> None:
    accelerator.gradient_accumulation_steps = accumulation
    dataset = TensorDataset(torch.arange(num_samples))
    model, dataloader = accelerator.prepare(
        nn.Linear(1, 1), DataLoader(dataset, batch_size=batch_size, shuffle=True)
    )
    seen: list[list[int]] = [[]]
    for _ in range(3):
        for (indices,) in dataloader:
            with accelerator.accumulate(model):
                seen[-1] += indices.tolist()
                if accelerator.sync_gradients:
                    seen.append([])
    assert seen.pop() == []
    assert (
        list(islice(window_indices(num_samples, batch_size, accumulation, 1, 11), len(seen)))
        == seen
    )
    assert len(seen) == 3 * windows_per_epoch(num_samples, batch_size, accumulation, 1)


@pytest.mark.parametrize("num_processes", [2, 3])
@pytest.mark.parametrize(("num_samples", "batch_size", "accumulation"), SIZES)
def test_windows_of_several_ranks(
    accelerator: Accelerator,
    num_samples: int,
    batch_size: int,
    accumulation: int,
    num_processes: int,
) -> None:
    dataloaders = [
        prepare_data_loader(
            DataLoader(
                TensorDataset(torch.arange(num_samples)), batch_size=batch_size, shuffle=True
            ),
            num_processes=num_processes,
            process_index=rank,
            use_seedable_sampler=True,
            data_seed=11,
        )
        for rank in range(num_processes)
    ]
    expected: list[list[int]] = []
    for _ in range(2):
        ranks = [[batch.tolist() for (batch,) in dataloader] for dataloader in dataloaders]
        for start in range(0, len(ranks[0]), accumulation):
            window = [batch for rank in ranks for batch in rank[start : start + accumulation]]
            expected.append([index for batch in window for index in batch])
    windows = window_indices(num_samples, batch_size, accumulation, num_processes, 11)
    assert list(islice(windows, len(expected))) == expected
    per_epoch = windows_per_epoch(num_samples, batch_size, accumulation, num_processes)
    assert len(expected) == 2 * per_epoch


def test_windows_of_nothing() -> None:
    with pytest.raises(ValueError, match="num_samples must be at least 1"):
        next(window_indices(0, 4, 1, 1, 0))
