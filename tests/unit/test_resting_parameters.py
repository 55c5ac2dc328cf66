"""What is frozen in all jobs does not cross, and must stay what it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch.nn import functional as F

from tests.oracle import Case, build_network
from tests.unit.jobs import DonorAlone, ReceiverAlone, batches
from toolkit import BridgeConfig, GradientDonor, SchemaMismatchError
from toolkit.bridge.config import FrozenRule
from toolkit.bridge.own_weights import newest_own_weights

BASE = ("backbone.0.bias", "backbone.0.weight")


class Jobs:
    """Jobs that end with the test."""

    def __init__(self, runs_dir: Path, stack: contextlib.ExitStack) -> None:
        self.runs_dir, self._stack = runs_dir, stack

    def receiver(self, **settings: Any) -> ReceiverAlone:
        job = ReceiverAlone(self.runs_dir, rests=BASE, **settings)
        self._stack.enter_context(job.receiver)
        return job

    def donor(self) -> DonorAlone:
        job = DonorAlone(self.runs_dir, rests=BASE)
        self._stack.enter_context(job.donor)
        return job

    def join_as_donor(
        self, frozen: Sequence[str], rule: FrozenRule = "rest", change: float = 0.0
    ) -> GradientDonor:
        """A donor one of whose parameters is off by something."""
        network = build_network(Case(), ("h2",))
        for name in frozen:
            network.get_parameter(name).requires_grad_(False)
        with torch.no_grad():
            network.get_parameter(BASE[1])[0, 0] += change
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        config = BridgeConfig(runs_dir=self.runs_dir, peer_wait=0.1, frozen=rule)
        donor = GradientDonor(Accelerator(cpu=True), network, optimizer, config)
        return self._stack.enter_context(donor)


@pytest.fixture
def jobs(tmp_path: Path, fresh_state: None) -> Iterator[Jobs]:
    with contextlib.ExitStack() as stack:
        yield Jobs(tmp_path, stack)


def backward(job: DonorAlone) -> None:
    inputs, labels = next(batches("h2", [5]))
    job.donor.backward(F.cross_entropy(job.network(inputs, "h2"), labels), num_samples=5)


def test_that_a_receiver_sends_and_takes_the_rest(jobs: Jobs) -> None:
    job = jobs.receiver()
    before = {n: p.detach().clone() for n, p in job.receiver.shared.parameters.items()}
    payload = job.constant(0.5)
    assert set(payload) == set(before) - {*BASE}
    with job.accelerator.accumulate(job.model):
        job.backward()
        assert set(job.weights_record().tensors) == set(job.receiver.shared.weights) - {*BASE}
        job.donate(payload)
        job.receiver.inject()
        job.optimizer.step()
        assert job.receiver.commit()
    assert job.receiver.fates()["applied"] == 1
    for name, parameter in before.items():
        assert torch.equal(job.network.get_parameter(name), parameter) == (name in BASE)


def test_that_a_donor_sends_and_takes_the_rest(jobs: Jobs) -> None:
    job = jobs.donor()
    base = [job.network.get_parameter(name).clone() for name in BASE]
    job.publish_weights(0, fill=0.25)
    assert job.donor.begin_window()
    backward(job)
    assert job.donor.publish()
    assert set(job.payload(0).tensors) == set(job.donor.shared.parameters) - {*BASE}
    assert all(map(torch.equal, base, map(job.network.get_parameter, BASE)))
    assert torch.all(job.network.get_parameter("backbone.2.weight") == 0.25)


def test_that_a_donors_own_weights_are_whole(jobs: Jobs) -> None:
    job = jobs.donor()
    assert job.donor.begin_window()
    backward(job)
    assert not job.donor.publish()
    job.donor.close()
    record = newest_own_weights(job.donor.transport, "donor", job.donor._reading.read)
    assert record is not None
    assert set(record.tensors) == set(job.donor.shared.weights)


def test_that_other_values_are_refused_by_name(jobs: Jobs) -> None:
    jobs.receiver()
    with pytest.raises(SchemaMismatchError) as refused:
        jobs.join_as_donor(BASE, change=1e-15)
    text = str(refused.value)
    assert "backbone.0.weight: donor float64 (8, 6) frozen at " in text
    assert "backbone.0.bias" not in text
    assert "BridgeConfig(frozen='cross') in all of them" in text
    jobs.join_as_donor(BASE).close()


def test_that_a_job_that_trains_it_is_refused(jobs: Jobs) -> None:
    jobs.receiver()
    with pytest.raises(SchemaMismatchError, match=r"backbone\.0\.weight: donor float64 \(8, 6\), "):
        jobs.join_as_donor(BASE[:1])


def test_that_it_crosses_where_all_jobs_say_so(jobs: Jobs) -> None:
    job = jobs.receiver(frozen="cross")
    donor = jobs.join_as_donor((), "cross", change=1.0)
    job.step()
    assert set(job.weights_record().tensors) == set(job.receiver.shared.weights)
    assert set(job.constant(0.0)) == set(job.receiver.shared.parameters)
    assert donor.begin_window()
    for name in BASE:
        assert torch.equal(donor.shared.parameters[name], job.network.get_parameter(name))


def test_that_unfreezing_is_refused(jobs: Jobs) -> None:
    job = jobs.receiver()
    job.step()
    job.network.get_parameter(BASE[0]).requires_grad_(True)
    with pytest.raises(
        RuntimeError, match=r"backbone\.0\.bias requires a gradient, but it was fro"
    ):
        job.step()


def test_that_new_values_are_refused_and_the_same_ones_are_not(jobs: Jobs) -> None:
    job = jobs.donor()
    job.publish_weights(0, fill=0.25)
    assert job.donor.begin_window()
    job.network.load_state_dict(job.network.state_dict())
    backward(job)
    assert job.donor.publish()
    job.publish_weights(1, fill=0.5)
    assert job.donor.begin_window()
    with torch.no_grad():
        job.network.get_parameter(BASE[1]).mul_(2)
    backward(job)
    with pytest.raises(RuntimeError, match=r"backbone\.0\.weight has other values now"):
        job.donor.publish()


def test_that_new_values_behind_torchs_back_are_refused(jobs: Jobs) -> None:
    job = jobs.receiver()
    job.step()
    weight = job.network.get_parameter(BASE[1])
    before, version = weight.detach().clone(), weight._version
    weight.data += 0.5  # so adapters are merged
    assert weight._version == version
    with pytest.raises(RuntimeError, match=r"backbone\.0\.weight has other values now"):
        job.step()
    weight.data.copy_(before)  # and unmerged
    job.receiver._resting.check()
