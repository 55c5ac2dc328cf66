"""The donor by itself: exact local steps, its bounds, and calls that it misses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

from tests.oracle import Case, build_dataset, build_network
from tests.unit.jobs import DonorAlone, batches, reset


@pytest.fixture(autouse=True)
def _fresh_state() -> Iterator[None]:
    reset()
    yield
    reset()


def loader(job: DonorAlone, batch_size: int) -> DataLoader[tuple[torch.Tensor, ...]]:
    plain = DataLoader(build_dataset(Case(), "h2"), batch_size=batch_size)
    prepared: DataLoader[tuple[torch.Tensor, ...]] = job.accelerator.prepare(plain)
    return prepared


def test_that_a_lone_donor_takes_exact_steps_up_to_its_bound(tmp_path: Path) -> None:
    job = DonorAlone(tmp_path / "runs", accumulation=3)
    windows = 0
    with job.donor as donor:
        for inputs, labels in donor.follow(loader(job, 9), max_windows=3):  # 61 rows: 9, ..., 7
            with job.accelerator.accumulate(job.model):
                donor.backward(F.cross_entropy(job.model(inputs, "h2"), labels), len(labels))
                assert not donor.publish()
                assert not donor.following
                job.optimizer.step()
                job.optimizer.zero_grad()
            windows += job.accelerator.sync_gradients
    assert windows == donor.completed_windows == 3

    twin = build_network(Case(), ("h2",))
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    for inputs, labels in batches("h2", [27, 27, 7]):
        optimizer.zero_grad()
        F.cross_entropy(twin(inputs, "h2"), labels).backward()
        optimizer.step()
    for name, parameter in twin.named_parameters():
        assert torch.allclose(job.model.get_parameter(name), parameter, rtol=0, atol=1e-14), name


def test_that_a_forgotten_publish_is_noticed(tmp_path: Path) -> None:
    job = DonorAlone(tmp_path / "runs")
    with job.donor as donor:
        following = donor.follow(loader(job, 9))
        inputs, labels = next(following)
        with job.accelerator.accumulate(job.model):
            donor.backward(F.cross_entropy(job.model(inputs, "h2"), labels), len(labels))
        inputs, labels = next(following)
        loss = F.cross_entropy(job.model(inputs, "h2"), labels)
        with pytest.raises(RuntimeError, match=r"publish\(\) \(donor\)"):
            donor.backward(loss, len(labels))


def test_that_an_empty_dataloader_is_refused(tmp_path: Path) -> None:
    job = DonorAlone(tmp_path / "runs")
    with pytest.raises(ValueError, match="is empty"), job.donor as donor:
        next(donor.follow(DataLoader([])))  # type: ignore[arg-type]
