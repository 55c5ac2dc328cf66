"""Compressed payloads of a donor: what they hold, what is left out, and a restart."""

from __future__ import annotations

import logging
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from tests.oracle import Case, build_dataset, build_network, compress_by_hand
from tests.unit.jobs import DonorAlone, StartDonor, reset
from tests.unit.run_files import Inspect
from toolkit import BridgeConfig, GradientDonor, cli
from toolkit.bridge import runs
from toolkit.bridge.compression import Compression
from toolkit.bridge.payload import Kind, Record, decompressed
from toolkit.parameters import same_bits

pytestmark = pytest.mark.usefixtures("fresh_state")
RATIO = 0.1
TOPK: dict[str, Any] = {"compression": "topk", "topk_ratio": RATIO, "exchange": "gradient"}
NUM_ELEMENTS = 125  # of backbone and h2


@pytest.fixture
def start(start_donor: StartDonor, monkeypatch: pytest.MonkeyPatch) -> StartDonor:
    monkeypatch.setattr(runs, "BEAT_SECONDS", 0.2)  # a resume waits for the killed job's silence
    return partial(start_donor, **TOPK)


def test_that_inspect_says_how_payloads_are_compressed(
    start: StartDonor, inspect: Inspect, capsys: pytest.CaptureFixture[str]
) -> None:
    topk, none = start(), start("others", compression="none", topk_ratio=0.01)

    for job, expected in (topk, "topk"), (none, "none"):
        (donor,) = inspect(job.donor.run_dir)[1]["jobs"]
        assert donor["compression"] == expected
        cli.main(["inspect", str(job.donor.run_dir), "--seconds", "0.02"])
        is_said = "payloads of donor are compressed: topk" in capsys.readouterr().out
        assert is_said == (expected == "topk")


class Following:
    """A donor that answers weights, one window after the other, on uneven batches."""

    def __init__(self, job: DonorAlone) -> None:
        self.job = job
        plain = DataLoader(build_dataset(Case(), "h2"), batch_size=9)  # 61 samples: the last has 7
        self.batches = job.donor.follow(job.accelerator.prepare(plain))

    def answer(self, step: int | None, factor: float = 1.0) -> None:
        """One window at new weights, or at the present ones again."""
        if step is not None:
            self.job.publish_weights(step, fill=0.0, noise=True)
        inputs, labels = next(self.batches)
        loss = F.cross_entropy(self.job.model(inputs, "h2"), labels) * factor
        self.job.donor.backward(loss, len(labels))
        assert self.job.donor.publish()

    def reject(self, sequence: int) -> None:
        self.job.donor.transport.reject("donor", sequence, "digest", "as if it were damaged")


def vector(record: Record, job: DonorAlone) -> Tensor:
    """A payload's tensors, decompressed, in the order of the parameters."""
    dense = decompressed(record, job.donor._payloads_like).tensors
    return torch.cat([dense[name].flatten() for name in job.donor._gradient_parameters("heads.h2")])


def weights_at(step: int) -> dict[str, Tensor]:
    """What the receiver has published after this many steps."""
    generator = torch.Generator().manual_seed(step)
    like = build_network(Case(), ("h2",)).state_dict()
    return {
        name: torch.zeros_like(like[name]) + torch.randn(like[name].shape, generator=generator)
        for name in sorted(like)
    }


def sum_by_hand(batch: int, step: int) -> tuple[Tensor, int]:
    """The gradient sum of a batch at the weights of a step, and its samples."""
    network = build_network(Case(), ("h2",))
    network.load_state_dict(weights_at(step))
    inputs, labels = build_dataset(Case(), "h2")[9 * batch : 9 * batch + 9]
    F.cross_entropy(network(inputs, "h2"), labels, reduction="sum").backward()
    grads = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    return torch.cat([grad.flatten() for grad in grads]), len(labels)


def test_that_payloads_hold_the_largest_and_remember_the_rest(start: StartDonor) -> None:
    job = start()
    following = Following(job)
    left = torch.zeros(NUM_ELEMENTS, dtype=torch.float64)
    for step in range(9):  # more than an epoch, so that the counts differ
        following.answer(step)
        total, count = sum_by_hand(step % 7, step)
        expected = compress_by_hand("topk", total, left, count)
        record = job.payload(step)
        assert record.header.compression == "topk"
        assert record.header.count == count == (7 if step == 6 else 9)
        assert float((vector(record, job) - expected).abs().max()) <= 1e-13
        assert int(expected.count_nonzero()) == math.ceil(RATIO * NUM_ELEMENTS)
        found = job.donor.metrics["bridge/residual donor (gradient norms)"]
        assert found == pytest.approx(float(left.norm() / (total / count).norm()))


def test_that_a_rejected_payload_is_as_if_it_was_never_sent(
    start: StartDonor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What follows begins with the same residual: the same sent again, or the next after a skip."""
    job = start()
    following = Following(job)
    left = torch.zeros(NUM_ELEMENTS, dtype=torch.float64)

    def check(sequence: int, batch: int, step: int, is_rejected: bool = False) -> None:
        total, count = sum_by_hand(batch, step)
        expected = compress_by_hand("topk", total, left.clone() if is_rejected else left, count)
        found = vector(job.payload(sequence), job)
        assert float((found - expected).abs().max()) <= 1e-13, sequence
        if is_rejected:
            following.reject(sequence)

    following.answer(0)
    check(0, batch=0, step=0)
    following.answer(1)
    check(1, batch=1, step=1, is_rejected=True)
    following.answer(None)  # computed again, on the next batch
    check(2, batch=2, step=1, is_rejected=True)

    publish = job.donor._publish_payload

    def publish_and_go_on(kind: Kind, *payload: Any) -> int:
        size = publish(kind, *payload)
        if kind == "skip":
            job.publish_weights(2, fill=0.0, noise=True)
        return size

    with monkeypatch.context() as patch:
        patch.setattr(job.donor, "_publish_payload", publish_and_go_on)
        following.answer(None)  # instead of a third try the donor says that there is nothing
    assert job.payload(3).header.kind == "skip"
    check(4, batch=3, step=2, is_rejected=True)
    following.answer(3)  # the receiver went on without
    check(5, batch=4, step=3)
    following.answer(4, factor=math.inf)
    assert (job.payload(6).header.kind, job.payload(6).header.compression) == ("skip", "none")
    following.answer(5)
    check(7, batch=6, step=5)


def test_that_a_restart_from_a_checkpoint_goes_on_bitwise(
    start: StartDonor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    payloads = {}
    for name in ("whole", "killed"):
        job = start(name)
        following = Following(job)
        for step in range(3):
            following.answer(step)
        if name == "killed":
            job.accelerator.save_state(str(tmp_path / "checkpoint"))
            job.donor._stop()
            job = start(name, resume_from_checkpoint=tmp_path / "checkpoint")
            job.accelerator.load_state(str(tmp_path / "checkpoint"))
            job.published = 3
            following = Following(job)
        for step in range(3, 5):
            following.answer(step)
        payloads[name] = [vector(job.payload(sequence), job) for sequence in range(5)]
    for one, other in zip(payloads["whole"], payloads["killed"], strict=True):
        assert same_bits(one, other)
    assert "is lost" not in caplog.text
    step_4 = sum_by_hand(4, 4)[0]
    alone = compress_by_hand("topk", step_4, torch.zeros(NUM_ELEMENTS).double(), 9)
    assert not torch.allclose(payloads["whole"][4], alone), "the residual makes no difference"


@pytest.mark.parametrize(
    ("before", "num_after", "reason"),
    [("topk", 1, "is older than the newest payload"), ("none", 0, "has none of it")],
)
def test_that_a_restart_begins_at_zero_where_the_residual_is_not_known(
    start: StartDonor, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    before: str, num_after: int, reason: str,
) -> None:  # fmt: skip
    plain = {"compression": "none", "topk_ratio": 0.01}
    job = start(**(plain if before == "none" else {}))
    following = Following(job)
    following.answer(0)
    following.answer(1)
    job.accelerator.save_state(str(tmp_path / "checkpoint"))
    for step in range(2, 2 + num_after):
        following.answer(step)
    job.donor._stop()
    resumed = start(resume_from_checkpoint=tmp_path / "checkpoint")
    with caplog.at_level(logging.WARNING):
        resumed.accelerator.load_state(str(tmp_path / "checkpoint"))
    assert "what earlier payloads have left out (compression 'topk') is lost" in caplog.text
    assert reason in caplog.text
    resumed.published = job.published
    number = 2 + num_after
    Following(resumed).answer(number)
    total, count = sum_by_hand(number, number)
    zero = torch.zeros_like(total)
    found = vector(resumed.payload(number), resumed)
    assert float((found - compress_by_hand("topk", total, zero, count)).abs().max()) <= 1e-13


@pytest.mark.parametrize(("before", "is_lost"), [("topk", True), ("none", False)])
def test_that_a_start_without_topk_says_what_it_loses(
    start: StartDonor, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    before: str, is_lost: bool,
) -> None:  # fmt: skip
    plain = {"compression": "none", "topk_ratio": 0.01}
    job = start(**(plain if before == "none" else {}))
    Following(job).answer(0)
    job.accelerator.save_state(str(tmp_path / "checkpoint"))
    job.donor._stop()
    resumed = start(resume_from_checkpoint=tmp_path / "checkpoint", **plain)
    with caplog.at_level(logging.WARNING):
        resumed.accelerator.load_state(str(tmp_path / "checkpoint"))
    assert ("has it, and this start has compression 'none'" in caplog.text) == is_lost
    assert ("is lost" in caplog.text) == is_lost


def test_that_the_difference_of_local_steps_has_a_memory_too(start: StartDonor) -> None:
    job = start(exchange="delta", local_steps=2)
    dataset = DataLoader(build_dataset(Case(), "h2"), batch_size=9)
    batches = job.donor.follow(job.accelerator.prepare(dataset), max_windows=8)
    parameters = job.donor._gradient_parameters("heads.h2")
    left = torch.zeros(NUM_ELEMENTS, dtype=torch.float64)
    changes = []
    for round_ in range(4):
        job.publish_weights(2 * round_, fill=0.0, noise=True)
        for _ in range(2):
            inputs, labels = next(batches)
            job.donor.backward(F.cross_entropy(job.model(inputs, "h2"), labels), len(labels))
            assert not job.donor.publish()
            job.optimizer.step()
            job.optimizer.zero_grad()
        begun = weights_at(2 * round_)
        changes.append(
            torch.cat([(p.detach() - begun[name]).flatten() for name, p in parameters.items()])
        )
    assert next(batches, None) is None
    for sequence, change in enumerate(changes):
        record = job.payload(sequence)
        assert (record.header.kind, record.header.count) == ("delta", 18 if sequence < 3 else 16)
        expected = compress_by_hand("topk", change, left, 1)
        assert float((vector(record, job) - expected).abs().max()) <= 1e-13


@pytest.mark.parametrize("compression", ["bf16", "topk"])
def test_that_complex_gradients_are_not_compressed(
    tmp_path: Path, compression: Compression
) -> None:
    reset()
    accelerator = Accelerator(cpu=True)
    network = build_network(Case(), ("h2",))
    network.backbone.register_parameter("wave", torch.nn.Parameter(torch.ones(2) * 1j))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(network, optimizer)
    config = BridgeConfig(runs_dir=tmp_path / "runs", compression=compression)
    with pytest.raises(ValueError, match=r"imaginary part of 'backbone\.wave', which is torch\.c"):
        GradientDonor(accelerator, model, optimizer, config)
