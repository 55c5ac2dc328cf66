"""The donor by itself: exact local steps, its bounds, and calls that it misses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch.nn import functional as F
from torch.utils.data import DataLoader

from tests.oracle import Case, build_dataset, build_network
from tests.unit.jobs import DonorAlone, StartDonor, batches, reset
from toolkit import BridgeConfig, BridgeError, GradientDonor
from toolkit.bridge.errors import DiskError
from toolkit.bridge.reading import _LACKS, _READ
from toolkit.bridge.transport import READ_SECONDS

pytestmark = pytest.mark.usefixtures("fresh_state")


def loader(job: DonorAlone, batch_size: int) -> DataLoader[tuple[torch.Tensor, ...]]:
    plain = DataLoader(build_dataset(Case(), "h2"), batch_size=batch_size)
    prepared: DataLoader[tuple[torch.Tensor, ...]] = job.accelerator.prepare(plain)
    return prepared


def test_that_a_lone_donor_takes_exact_steps_up_to_its_bound(start_donor: StartDonor) -> None:
    job = start_donor(accumulation=3)
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


def test_that_a_forgotten_publish_is_noticed(start_donor: StartDonor) -> None:
    job = start_donor()
    with job.donor as donor:
        following = donor.follow(loader(job, 9))
        inputs, labels = next(following)
        with job.accelerator.accumulate(job.model):
            donor.backward(F.cross_entropy(job.model(inputs, "h2"), labels), len(labels))
        inputs, labels = next(following)
        loss = F.cross_entropy(job.model(inputs, "h2"), labels)
        with pytest.raises(RuntimeError, match=r"publish\(\) \(donor\)"):
            donor.backward(loss, len(labels))


def test_that_an_empty_dataloader_is_refused(start_donor: StartDonor) -> None:
    job = start_donor()
    with pytest.raises(ValueError, match="is empty"), job.donor as donor:
        next(donor.follow(DataLoader([])))  # type: ignore[arg-type]


def test_that_a_last_window_that_nothing_would_end_is_refused(start_donor: StartDonor) -> None:
    job, rows = start_donor(accumulation=2), build_dataset(Case(), "h2")
    bare = DataLoader(rows, 13)
    with pytest.raises(ValueError, match=r"5 batches are no whole number of windows of 2.*prepare"):
        next(job.donor.follow(bare))


def test_that_a_follower_publishes_exact_sums_and_forgets_them(start_donor: StartDonor) -> None:
    job = start_donor()
    following = job.donor.follow(loader(job, 9))
    for step, fill in ((0, 0.1), (1, 0.2)):
        job.publish_weights(step, fill)
        inputs, labels = next(following)
        with job.accelerator.accumulate(job.model):
            job.donor.backward(F.cross_entropy(job.model(inputs, "h2"), labels), len(labels))
            assert job.donor.publish()  # and no zero_grad(): these gradients are the receiver's
        assert all(parameter.grad is None for parameter in job.network.parameters())
        twin = build_network(Case(), ("h2",))
        for parameter in twin.parameters():
            torch.nn.init.constant_(parameter, fill)
        F.cross_entropy(twin(inputs, "h2"), labels, reduction="sum").backward()
        record = job.payload(step)
        assert (record.header.receiver_step, record.header.count) == (step, 9)
        for name, parameter in twin.named_parameters():
            assert parameter.grad is not None
            difference = record.tensors[name] - parameter.grad
            assert difference.abs().max() <= 1e-13, name
    job.publish_weights(1, 0.3, kind="end")
    assert next(following, None) is None
    assert job.donor.stop_reason == "the receiver has ended"


@pytest.mark.parametrize("has_ended", [False, True])
def test_that_a_rank_that_never_reads_the_weights_ends_the_job(
    start_donor: StartDonor, monkeypatch: pytest.MonkeyPatch, has_ended: bool
) -> None:
    job = start_donor(exchange="gradient")
    job.donor.config.peer_wait = 3 * READ_SECONDS
    job.publish_weights(step=0, fill=0.1)
    if has_ended:
        job.publish_weights(step=0, fill=0.1, kind="end")
    num_read = 0

    def vote(value: float) -> float:
        nonlocal num_read
        if value != _READ:
            return value
        num_read += 1
        return _LACKS  # as where another rank could not

    monkeypatch.setattr(job.donor.control, "min", vote)
    with pytest.raises(DiskError, match="not every rank could read the receiver's weights, in 3"):
        next(job.donor.follow(loader(job, 9)))
    assert num_read == 3


def test_that_a_window_that_is_not_used_is_not_lost(start_donor: StartDonor) -> None:
    job = start_donor()
    following = job.donor.follow(loader(job, 9))
    job.publish_weights(0, 0.1)
    next(following)  # as a loop that goes on to the next batch without a backward
    inputs, labels = next(following)
    job.donor.backward(F.cross_entropy(job.model(inputs, "h2"), labels), len(labels))
    assert job.donor.publish()
    assert job.payload(0).header.receiver_step == 0


@pytest.mark.parametrize(
    ("num_samples", "factor", "scale_after"),
    [(9, 1.0, 2.0**10), (9, 1e38, 2.0**9), (0, 0.0, 2.0**10)],
    ids=["finite", "overflow", "no samples"],
)
def test_that_only_an_overflow_lowers_the_loss_scale(
    start_donor: StartDonor, num_samples: int, factor: float, scale_after: float
) -> None:
    job = start_donor(loss_reduction="sum")
    job.network.float()
    job.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    job.publish_weights(0, 0.1)
    inputs, labels = next(job.donor.follow(loader(job, 9)))
    loss = F.cross_entropy(job.model(inputs.float(), "h2"), labels, reduction="sum") * factor
    job.donor.backward(loss, num_samples)
    assert job.donor.publish()
    assert job.payload(0).header.kind == ("gradient" if factor == 1.0 else "skip")
    assert job.accelerator.scaler.get_scale() == scale_after


def test_that_gradients_of_another_model_are_noticed(start_donor: StartDonor) -> None:
    job = start_donor()
    other = build_network(Case(), ("h2",))
    job.publish_weights(0, 0.1)
    inputs, labels = next(job.donor.follow(loader(job, 9)))
    job.donor.backward(F.cross_entropy(other(inputs, "h2"), labels), len(labels))
    with pytest.raises(RuntimeError, match="no shared parameter got a gradient"):
        job.donor.publish()


def test_that_weights_are_not_loaded_under_autocast(start_donor: StartDonor) -> None:
    job = start_donor()
    following = job.donor.follow(loader(job, 9))
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match="autocast"):
        next(following)


def test_that_parameters_which_cannot_cross_are_refused(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    network = build_network(Case())  # with h1, which requires a gradient
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    config = BridgeConfig(runs_dir=tmp_path / "runs")
    with pytest.raises(ValueError, match=r"outside backbone and head: heads\.h1\.weight"):
        GradientDonor(accelerator, network, optimizer, config)


def test_that_parameters_of_another_model_are_refused(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    network = build_network(Case(), ("h2",))
    elsewhere = torch.nn.Linear(3, 7)
    optimizer = torch.optim.SGD([*network.parameters(), *elsewhere.parameters()], lr=0.1)
    config = BridgeConfig(runs_dir=tmp_path / "runs")
    with pytest.raises(ValueError, match=r"shape \(7, 3\) that is not in the model"):
        GradientDonor(accelerator, network, optimizer, config)


def test_that_fp16_without_a_scaler_is_refused(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True, mixed_precision="fp16")
    network = build_network(Case(), ("h2",))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    config = BridgeConfig(runs_dir=tmp_path / "runs")
    with pytest.raises(BridgeError, match="fp16 needs a GPU"):
        GradientDonor(accelerator, network, optimizer, config)


def test_that_the_receiver_is_told_what_its_weights_are_worth(start_donor: StartDonor) -> None:
    job = start_donor()
    job.publish_weights(step=0, fill=0.1)
    with job.donor as donor:
        with pytest.raises(RuntimeError, match="never had"):
            donor.report({"h2 (%)": 1.0})
        for step, (inputs, labels) in enumerate(donor.follow(loader(job, 9), max_windows=3)):
            with job.accelerator.accumulate(job.model):
                loss = F.cross_entropy(job.model(inputs, "h2"), labels)
                if step == 1:
                    loss = loss * torch.inf  # a skip record tells nothing
                donor.backward(loss, len(labels))
                assert donor.publish()
                job.optimizer.zero_grad()
            if step == 0:
                donor.report({"h2 (%)": 87.5})
            job.publish_weights(step=step + 1, fill=0.1)
    headers = [job.payload(sequence).header for sequence in range(3)]
    assert [header.kind for header in headers] == ["gradient", "skip", "gradient"]
    assert [header.validation for header in headers] == [{}, {}, {"h2 (%)": 87.5}]


def take_local_steps(job: DonorAlone, max_windows: int) -> list[bool]:
    """Windows up to a bound; after each, whether the weights are as the receiver published them."""
    seen = []
    for inputs, labels in job.donor.follow(loader(job, 9), max_windows):
        seen.append(job.donor.at_receiver_weights)
        with job.accelerator.accumulate(job.model):
            job.donor.backward(F.cross_entropy(job.model(inputs, "h2"), labels), len(labels))
            assert not job.donor.publish()
            job.optimizer.step()
            job.optimizer.zero_grad()
    return seen


@pytest.mark.parametrize(
    ("settings", "published", "expected"),
    [
        ({"exchange": "gradient"}, 4, [4]),
        ({"exchange": "auto"}, None, [1, 2]),
        ({"exchange": "delta", "local_steps": 2}, 4, [5, 6]),
        ({"exchange": "distill"}, None, [1, 2]),
    ],
    ids=["following", "alone", "local steps", "by itself"],
)
def test_after_which_step_the_weights_are(
    start_donor: StartDonor,
    settings: dict[str, Any],
    published: int | None,
    expected: list[int],
) -> None:
    job = start_donor(**settings)
    if published is not None:
        job.publish_weights(step=published, fill=0.1)
    seen = []
    with job.donor as donor:
        for inputs, labels in donor.follow(loader(job, 9), max_windows=len(expected)):
            with job.accelerator.accumulate(job.model):
                donor.backward(F.cross_entropy(job.model(inputs, "h2"), labels), len(labels))
                if not donor.publish():
                    job.optimizer.step()
                job.optimizer.zero_grad()
            seen.append(donor.weights_step)
        assert donor.weights_step == seen[-1]
    assert seen == expected


def test_that_the_last_round_before_the_bound_is_handed_over(start_donor: StartDonor) -> None:
    job = start_donor(exchange="delta", local_steps=2)
    job.publish_weights(step=0, fill=0.1)
    with job.donor as donor:
        assert take_local_steps(job, max_windows=2) == [True, False]
        assert not donor.at_receiver_weights
        assert donor.published_windows == donor.completed_windows == 2
    assert [job.payload(sequence).header.kind for sequence in (0, 1)] == ["delta", "end"]


def test_that_a_resume_takes_the_steps_of_an_unfinished_round_again(
    start_donor: StartDonor, tmp_path: Path
) -> None:
    job = start_donor(exchange="delta", local_steps=2)
    job.publish_weights(step=0, fill=0.1)
    take_local_steps(job, max_windows=2)
    job.publish_weights(step=2, fill=0.2)
    take_local_steps(job, max_windows=3)
    job.accelerator.save_state(str(tmp_path / "checkpoint"))
    job.donor._stop()  # as after an error
    reset()
    resumed = start_donor(
        exchange="delta", local_steps=2, resume_from_checkpoint=tmp_path / "checkpoint"
    )
    resumed.accelerator.load_state(str(tmp_path / "checkpoint"))
    assert resumed.donor.completed_windows == 2
