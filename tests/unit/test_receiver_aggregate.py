"""What the receiver steps with where the donor's gradient conflicts with its own."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.oracle import Case, build_network
from tests.unit.jobs import ReceiverAlone, batches, reset, weights_of
from toolkit.bridge import injection

LAMBDA, NUM_DONOR = 0.7, 4.0
RULES = ["sum", "pcgrad", "upgrad", "mgda", "protect"]


@contextmanager
def receiver_alone(directory: Path, **settings: Any) -> Iterator[ReceiverAlone]:
    reset()
    job = ReceiverAlone(directory, donor_weight=LAMBDA, **settings)
    try:
        yield job
    finally:
        job.receiver.close()
        reset()


def own_gradients(network: nn.Module, size: int) -> dict[str, Tensor]:
    """The gradient of the mean loss over the first ``size`` samples, without the bridge."""
    inputs, labels = next(batches("h1", [size]))
    inputs = inputs.to(next(network.parameters()).dtype)
    trained = {name: p for name, p in network.named_parameters() if "h2" not in name}
    loss = F.cross_entropy(network(inputs, "h1"), labels)
    return dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))


def donor_sums(job: ReceiverAlone, against: float, size: int) -> dict[str, Tensor]:
    """A gradient sum: noise, and on the backbone ``against`` times the receiver's gradient."""
    generator = torch.Generator().manual_seed(5)
    own = own_gradients(job.network, size)
    return {
        name: 0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        + (against * own[name] if name in own else 0.0)
        for name, p in job.receiver._gradient_parameters("heads.h2").items()
    }


def combine_by_hand(rule: str, own: Tensor, donor: Tensor) -> Tensor:
    """The definitions, on two vectors."""
    dot = own @ donor
    own_off = own - dot / (donor @ donor) * donor if dot < 0 else own
    donor_off = donor - dot / (own @ own) * own if dot < 0 else donor
    if rule == "mgda":
        share = (donor - own) @ donor / ((donor - own) @ (donor - own))
        share = share.clamp(0, 1)
        return share * own + (1 - share) * donor
    return {
        "sum": own + donor,
        "pcgrad": own_off + donor_off,
        "upgrad": (own_off + donor_off) / 2,
        "protect": own + donor_off,
    }[rule]


def expected_gradients(
    rule: str, own: dict[str, Tensor], sums: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Of every parameter: the backbone's combined as one vector, the heads' their own."""
    donor = {name: LAMBDA * tensor / NUM_DONOR for name, tensor in sums.items()}
    names = [name for name in own if name.startswith("backbone.")]
    flat = [torch.cat([part[name].flatten() for name in names]) for part in (own, donor)]
    pieces = combine_by_hand(rule, *flat).split([own[name].numel() for name in names])
    backbone = {name: piece.view_as(own[name]) for name, piece in zip(names, pieces, strict=True)}
    return {**donor, **own, **backbone}


@pytest.mark.parametrize("against", [-9.0, 9.0], ids=["conflict", "agreement"])
@pytest.mark.parametrize("rule", RULES)
def test_a_step_equals_the_rules_definition(tmp_path: Path, rule: str, against: float) -> None:
    """Two accumulation micro-steps of unlike size, clipping, AdamW."""
    sizes = [2, 5]
    twin = build_network(Case())
    optimizer = torch.optim.AdamW(twin.parameters(), lr=0.01)
    with receiver_alone(tmp_path, accumulation=2, aggregate=rule) as job:
        sums = donor_sums(job, against, sum(sizes))
        expected = expected_gradients(rule, own_gradients(twin, sum(sizes)), sums)
        for number, (inputs, labels) in enumerate(batches("h1", sizes)):
            with job.accelerator.accumulate(job.model):
                loss = F.cross_entropy(job.network(inputs, "h1"), labels)
                job.receiver.backward(loss, num_samples=len(labels))
                if number == 0:
                    job.donate(sums, NUM_DONOR)
                job.receiver.inject()
                if job.accelerator.sync_gradients:
                    for name, parameter in job.network.named_parameters():
                        assert parameter.grad is not None, name
                        torch.testing.assert_close(
                            parameter.grad, expected[name], rtol=1e-12, atol=1e-14, msg=name
                        )
                    job.accelerator.clip_grad_norm_(job.model.parameters(), 0.05)
                job.optimizer.step()
                job.optimizer.zero_grad()
                job.receiver.commit()
        assert job.receiver.metrics["gradient/cosine own donor (backbone)"] * against > 0
        assert job.receiver.fates()["applied"] == 1
        for name, parameter in twin.named_parameters():
            parameter.grad = expected[name]
        nn.utils.clip_grad_norm_(twin.parameters(), 0.05)
        optimizer.step()
        for name, parameter in job.network.named_parameters():
            torch.testing.assert_close(
                parameter, twin.get_parameter(name), rtol=0, atol=1e-12, msg=name
            )


def trained(directory: Path, rule: str, init_scale: float) -> dict[str, Tensor]:
    """The weights after three clipped steps, the second without a donor's gradient."""
    with receiver_alone(directory, init_scale=init_scale, aggregate=rule) as job:
        for against in (-9.0, None, -30.0):
            with job.accelerator.accumulate(job.model):
                job.backward()
                if against is None:
                    job.donate(None, kind="skip")
                else:
                    job.donate(donor_sums(job, against, 5), NUM_DONOR)
                job.receiver.inject()
                if against is not None:
                    assert job.receiver.metrics["gradient/cosine own donor (backbone)"] < 0
                job.accelerator.clip_grad_norm_(job.model.parameters(), 0.5)
                job.optimizer.step()
                job.optimizer.zero_grad()
                assert job.receiver.commit()
        return weights_of(job.network)


@pytest.mark.parametrize("rule", RULES)
def test_that_a_scaler_changes_nothing(tmp_path: Path, rule: str) -> None:
    unscaled = trained(tmp_path / "unscaled", rule, 1.0)
    scaled = trained(tmp_path / "scaled", rule, 2.0**12)
    for name, tensor in unscaled.items():
        assert torch.equal(tensor, scaled[name]), name


def test_that_a_step_without_the_donor_is_the_receivers_own(tmp_path: Path) -> None:
    with receiver_alone(tmp_path, aggregate="upgrad") as job:
        job.backward()
        job.donate(None, kind="skip")
        job.receiver.inject()
        own = own_gradients(job.network, 5)
        for name, parameter in job.network.named_parameters():
            if name in own:
                torch.testing.assert_close(parameter.grad, own[name], rtol=1e-13, atol=1e-15)
            else:
                assert parameter.grad is None, name
        assert not [tag for tag in job.receiver.metrics if "weight (factor)" in tag]


@pytest.mark.parametrize(("rule", "calls"), [("sum", 0), ("mgda", 1)])
def test_that_a_sum_asks_no_rule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rule: str, calls: int
) -> None:
    asked: list[Callable[..., Tensor]] = []

    def ones(rule: Callable[..., Tensor], products: Tensor) -> Tensor:
        asked.append(rule)
        return torch.ones(2)

    monkeypatch.setattr(injection, "guarded_weights", ones)
    with receiver_alone(tmp_path, aggregate=rule) as job:
        job.backward()
        job.donate(donor_sums(job, -9.0, 5), NUM_DONOR)
        job.receiver.inject()
        assert len(asked) == calls
        assert ("gradient/own weight (factor)" in job.receiver.metrics) == bool(calls)


def test_that_an_overflow_leaves_the_payload_to_the_next_try(tmp_path: Path) -> None:
    with receiver_alone(tmp_path, init_scale=2.0**10, aggregate="pcgrad") as job:
        with job.accelerator.accumulate(job.model):
            job.backward(factor=1e38)  # finite, but not times the scale
            job.donate(donor_sums(job, -9.0, 5), NUM_DONOR)
            job.receiver.inject()
            assert job.receiver.metrics["gradient/own weight (factor)"] == 1.0
            job.optimizer.step()
            job.optimizer.zero_grad()
            assert not job.receiver.commit()
        assert job.receiver.fates()["pending"] == 1
        assert job.step()
        assert job.receiver.metrics["gradient/own weight (factor)"] > 1.0
        assert job.receiver.fates()["applied"] == 1


def test_the_metrics(tmp_path: Path) -> None:
    with receiver_alone(tmp_path, aggregate="pcgrad") as job:
        job.backward()
        sums = donor_sums(job, -9.0, 5)
        own = own_gradients(job.network, 5)
        job.donate(sums, NUM_DONOR)
        job.receiver.inject()
        metrics = job.receiver.metrics

    def norm(part: dict[str, Tensor], module: str = "") -> float:
        squares = [float(t.square().sum()) for n, t in part.items() if n.startswith(module)]
        return math.sqrt(math.fsum(squares))

    donor = {name: LAMBDA * tensor / NUM_DONOR for name, tensor in sums.items()}
    both = [name for name in own if name in donor]
    dot = math.fsum(float((own[name] * donor[name]).sum()) for name in both)
    own_norm, donor_norm = norm(own, "backbone"), norm(donor, "backbone")
    expected = {
        "gradient/own norm": norm(own),
        "gradient/donor norm": norm(donor),
        "gradient/cosine own donor (backbone)": dot / (own_norm * donor_norm),
        "gradient/own norm (backbone)": own_norm,
        "gradient/donor norm (backbone)": donor_norm,
        "gradient/own weight (factor)": 1 - dot / own_norm**2,
        "gradient/donor weight (factor)": 1 - dot / donor_norm**2,
    }
    assert {tag: metrics[tag] for tag in expected} == pytest.approx(expected, rel=1e-12)
    assert all(type(metrics[tag]) is float for tag in expected)


def test_a_weighting_of_torchjd(tmp_path: Path) -> None:
    if importlib.util.find_spec("torchjd") is None:
        pytest.skip("needs torchjd")
    with receiver_alone(tmp_path, aggregate="torchjd:IMTLG") as job:
        job.backward()
        sums = donor_sums(job, -9.0, 5)
        own = own_gradients(job.network, 5)
        job.donate(sums, NUM_DONOR)
        job.receiver.inject()
        step = {
            name: p.grad
            for name, p in job.network.backbone.named_parameters("backbone")
            if p.grad is not None
        }
    along = []  # IMTL-G: as far along the one as along the other
    for part in (own, sums):
        dot = math.fsum(float((step[name] * part[name]).sum()) for name in step)
        along.append(dot / math.sqrt(math.fsum(float(part[n].square().sum()) for n in step)))
    assert along[0] == pytest.approx(along[1], rel=1e-9)
    assert along[0] > 0
