"""Columns, labels, and the order of samples against Accelerate's own dataloaders."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import numpy as np
import pytest
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.data_loader import prepare_data_loader
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from toolkit.data import (
    check_labels,
    in_memory,
    make_dataset,
    shard_windows,
    take_shard,
    to_dtype,
    window_indices,
    windows_per_epoch,
)

IMAGES = np.linspace(0, 1, 9 * 6, dtype=np.float32).reshape(9, 1, 2, 3)
SIZES = [(83, 16, 1), (83, 16, 3), (80, 16, 2), (5, 8, 2), (9, 2, 4)]


def test_in_memory_keeps_rows() -> None:
    dataset = make_dataset(IMAGES, {"h1": np.arange(9), "h2": np.arange(9)})
    images, labels = in_memory(dataset, "h1")[[7, 2]]
    assert torch.equal(images, torch.from_numpy(IMAGES[[7, 2]]))
    assert labels.tolist() == [7, 2]


def test_that_texts_stay_token_numbers_and_images_take_the_dtype() -> None:
    tokens = np.arange(12).reshape(4, 3)
    texts, _ = in_memory(make_dataset(tokens, {"h1": np.zeros(4, dtype=np.int64)}), "h1")[:]
    assert to_dtype(texts, torch.float64).dtype == torch.int64
    assert texts.tolist() == tokens.tolist()
    assert to_dtype(torch.from_numpy(IMAGES), torch.float64).dtype == torch.float64


@pytest.mark.parametrize("bad", [5, -1, 1.0, None, "2"])
def test_check_labels_names_row_head_and_remedy(bad: object) -> None:
    check_labels([0, np.int64(4), 2], 5, "h2")
    with pytest.raises(ValueError, match=r"in row 2 .* head 'h2'.* from 0 to 4.*--num_classes"):
        check_labels([0, np.int64(4), bad], 5, "h2")


@pytest.mark.parametrize("num_shards", [1, 2, 4, 9])
def test_shards_are_disjoint_and_cover_everything(num_shards: int) -> None:
    silo = make_dataset(IMAGES, {"h2": np.arange(9)})
    shards = [in_memory(take_shard(silo, i, num_shards), "h2")[:] for i in range(num_shards)]
    labels = [label for _, part in shards for label in part.tolist()]
    assert sorted(labels) == list(range(9))
    for images, part in shards:
        assert torch.equal(images, torch.from_numpy(IMAGES[part.numpy()]))
        assert len(part) - 9 // num_shards in (0, 1)


def test_shards_of_sorted_labels_have_all_classes() -> None:
    silo = make_dataset(IMAGES, {"h2": np.repeat(np.arange(3), 3)})
    for index in range(2):
        assert set(in_memory(take_shard(silo, index, 2), "h2")[:][1].tolist()) == {0, 1, 2}


def test_an_empty_shard_is_refused() -> None:
    silo = make_dataset(IMAGES, {"h2": np.arange(9)})
    with pytest.raises(ValueError, match="shard 9/10 is empty: there are 9 rows"):
        take_shard(silo, 9, 10)


@pytest.mark.parametrize("num_shards", [1, 3])
def test_windows_of_shards(num_shards: int) -> None:
    silo = make_dataset(np.zeros((83, 1, 1, 1), dtype=np.float32), {"h2": np.arange(83)})
    shards = [
        in_memory(take_shard(silo, index, num_shards), "h2")[:][1] for index in range(num_shards)
    ]
    jobs = [window_indices(len(shard), 4, 2, 2, 11) for shard in shards]
    for window in islice(shard_windows(num_shards, 83, 4, 2, 2, 11), 20):
        assert window == [
            row
            for shard, job in zip(shards, jobs, strict=True)
            for row in shard[next(job)].tolist()
        ]


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
