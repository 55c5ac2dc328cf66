"""Gradients of older weights: what each rule makes of them, against one process by hand."""

from __future__ import annotations

import copy
import dataclasses
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.oracle import Case, Network, build_network, largest_difference
from tests.unit.jobs import ReceiverAlone, StartReceiver, batches, weights_of

LAMBDA = 0.7  # weight of the donor's loss
STRENGTH = 0.3  # lambda of the compensation
AGES = (0, 1, 0, 1, 2, 2, 0)  # of each step's payload
COUNTS = (4.0, 7.0, 3.0, 11.0, 5.0, 2.0, 6.0)
OWN_SIZE = 5
FROZEN = "backbone.0.weight"


@pytest.fixture
def start(start_receiver: StartReceiver) -> StartReceiver:
    return partial(start_receiver, max_staleness=2, donor_weight=LAMBDA)


class Run:
    """Steps of a receiver whose payloads have known ages."""

    def __init__(self, job: ReceiverAlone) -> None:
        self.job = job
        self.headers = [job.weights_record().header] if job.receiver._has_published else []

    def step(self, age: int | None, factor: float = 1.0) -> bool:
        """One step; the donor's payload answers the weights of ``age`` steps ago, if any."""
        job, number = self.job, self.job.receiver.completed_steps
        with job.accelerator.accumulate(job.model):
            job.backward(OWN_SIZE, factor)
            self.headers.append(job.weights_record().header)
            if age is not None:
                sums = donor_sum(job.network, number, job.receiver.config.scope)
                header = next(h for h in self.headers if h.receiver_step == number - age)
                job.donate(sums, COUNTS[number], weights=header)
            job.receiver.inject()
            job.optimizer.step()
            job.optimizer.zero_grad()
            return job.receiver.commit()

    def metric(self, unit: str) -> float | None:
        return self.job.receiver.metrics.get(f"bridge/staleness donor ({unit})")


def donor_sum(network: Network, number: int, scope: str = "all") -> dict[str, Tensor]:
    """The payload of step ``number``: large enough that its square matters."""
    generator = torch.Generator().manual_seed(number)
    return {
        name: (8 * torch.randn(p.shape, generator=generator, dtype=torch.float64)).to(p.dtype)
        for name, p in network.named_parameters()
        if name.startswith("heads.h2") or (scope == "all" and name.startswith("backbone"))
    }


@dataclasses.dataclass(frozen=True)
class Formula:
    """What is added to the mean own gradient, and how it may be wrong."""

    rule: str
    later: int = 0  # error of the age
    sign: int = 1  # of the difference of the weights
    strength: float = STRENGTH
    forgets_n: bool = False  # g is the sum

    def __call__(self, total: Tensor, n: float, age: int, now: Tensor, then: Tensor) -> Tensor:
        g = total if self.forgets_n else total / n
        if self.rule == "damp":
            g = g / max(1 + age + self.later, 1)
        elif self.rule == "compensate":
            g = g + self.strength * g * g * self.sign * (now - then)
        elif self.rule == "compensate_adaptive":
            g = g + self.strength / (g * g) ** 0.5 * g * g * self.sign * (now - then)
        return LAMBDA * (g / n if self.forgets_n else g)


def train_by_hand(formula: Formula, scope: str, frozen: bool, append: bool) -> list[Network]:
    """The network before each step, and after the last."""
    model = build_network(Case())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    inputs, labels = next(batches("h1", [OWN_SIZE]))
    versions = [copy.deepcopy(model)]
    for number, (age, count) in enumerate(zip(AGES, COUNTS, strict=True)):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs, "h1"), labels).backward()
        then = versions[max(number - age - formula.later * (age > 0), 0)]
        for name, total in donor_sum(model, number, scope).items():
            now = model.get_parameter(name)
            part = formula(total, count, age, now.detach(), then.get_parameter(name).detach())
            part *= count / OWN_SIZE if append else 1.0
            now.grad = part if now.grad is None else now.grad + part
        if frozen:
            model.get_parameter(FROZEN).grad = None
        optimizer.step()
        versions.append(copy.deepcopy(model))
    return versions


WRONG = {
    "apply": [Formula("damp"), Formula("compensate")],
    "damp": [Formula("apply"), Formula("damp", later=1), Formula("damp", later=-1)],
    "compensate": [
        Formula("apply"),
        Formula("compensate", later=1),
        Formula("compensate", sign=-1),
        Formula("compensate", strength=2 * STRENGTH),
        Formula("compensate", forgets_n=True),
    ],
    "compensate_adaptive": [
        Formula("apply"),
        Formula("compensate"),
        Formula("compensate_adaptive", later=1),
        Formula("compensate_adaptive", sign=-1),
        Formula("compensate_adaptive", strength=2 * STRENGTH),
    ],
}


@pytest.mark.parametrize("setting", ["plain", "head", "frozen", "append"])
@pytest.mark.parametrize("rule", list(WRONG))
def test_a_run_with_known_ages(start: StartReceiver, rule: str, setting: str) -> None:
    scope = "head" if setting == "head" else "all"
    rescale = "append" if setting == "append" else "match"
    strength = {"compensation": STRENGTH} if rule.startswith("compensate") else {}
    job = start(stale=rule, scope=scope, rescale=rescale, **strength)
    if setting == "frozen":
        job.network.get_parameter(FROZEN).requires_grad_(False)
    versions = train_by_hand(Formula(rule), scope, setting == "frozen", setting == "append")
    run = Run(job)
    for number, age in enumerate(AGES):
        assert run.step(age)
        assert run.metric("receiver steps") == age
        then, now = (weights_of(versions[at]) for at in (number - age, number))
        shared = [name for name in now if "h1" not in name]
        change = math.sqrt(math.fsum(float((now[n] - then[n]).square().sum()) for n in shared))
        assert (change == 0.0) == (age == 0)
        assert run.metric("norm of weight change") == pytest.approx(change, rel=1e-9)

    assert largest_difference(weights_of(job.network), weights_of(versions[-1])) <= 1e-12
    assert job.receiver.fates()["applied"] == len(AGES)
    for formula in WRONG[rule]:
        wrong = train_by_hand(formula, scope, setting == "frozen", setting == "append")[-1]
        assert largest_difference(weights_of(wrong), weights_of(versions[-1])) > 1e-5, formula


@pytest.mark.parametrize(("rule", "default"), [("compensate", 0.04), ("compensate_adaptive", 2.0)])
def test_the_strength_where_none_is_given(start: StartReceiver, rule: str, default: float) -> None:
    trained = []
    for strength in (None, default):
        job = start(stale=rule, compensation=strength)
        run = Run(job)
        for age in (0, 1, 2):
            run.step(age)
        job.receiver.close()
        trained.append(weights_of(job.network))
    assert largest_difference(*trained) == 0.0


def test_that_a_layer_unfrozen_since_has_not_changed(start: StartReceiver) -> None:
    job = start(stale="compensate", compensation=STRENGTH, max_staleness=1)
    run = Run(job)
    layer = job.network.get_parameter(FROZEN).requires_grad_(False)
    assert run.step(0)
    layer.requires_grad_(True)
    before = layer.detach().clone()
    assert run.step(1)
    assert not torch.equal(layer, before), "its gradient is applied all the same"


def test_that_an_older_version_outlives_an_overflow(start: StartReceiver) -> None:
    """The step after a skipped one needs the same versions, and the payload as it came."""
    scale, weight = 2.0**10, "heads.h2.weight"
    job = start(stale="compensate", compensation=STRENGTH, max_staleness=1, init_scale=scale)
    run = Run(job)
    assert run.step(0)
    then = job.network.get_parameter(weight).detach().clone()
    assert run.step(0)
    change = job.network.get_parameter(weight).detach() - then
    for age in (1, None):  # twice the same payload; a finite loss, but not times the scale
        assert not run.step(age, factor=1e38)
        assert run.metric("receiver steps") == 1
    job.backward(OWN_SIZE)
    job.receiver.inject()
    g = donor_sum(job.network, 2)[weight] / COUNTS[2]
    grad = job.network.get_parameter(weight).grad
    assert grad is not None
    expected = LAMBDA * (g + STRENGTH * g * g * change) * scale / 4  # fell twice, by half
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-5)
    assert float((expected - LAMBDA * g * scale / 4).abs().max()) > 1e-2


@pytest.mark.parametrize("restarts", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("rule", list(WRONG))
def test_that_a_checkpoint_is_gone_back_to(
    start: StartReceiver, tmp_path: Path, rule: str, restarts: bool
) -> None:
    """Of what was taken before it, all is applied but what needs the weights of then."""
    settings = {"stale": rule, "max_staleness": 1, "exchange": "gradient"}
    checkpoint = tmp_path / "checkpoint"
    job = start(**settings)
    run = Run(job)
    run.step(0)
    job.accelerator.save_state(str(checkpoint))
    run.step(1)
    undisturbed = weights_of(job.network)

    if restarts:
        job.receiver._stop()
        published = job.published
        job = start(resume_from_checkpoint=checkpoint, **settings)
        job.published = published
        run = Run(job)
    job.accelerator.load_state(str(checkpoint))
    assert run.step(None)  # the second payload is still there
    assert run.metric("norm of weight change") is None
    fates = job.receiver.fates()
    if rule.startswith("compensate"):
        assert (fates["applied"], fates["dropped"]) == (1, 1)
    else:
        assert (fates["applied"], fates["dropped"]) == (2, 0)
        assert largest_difference(weights_of(job.network), undisturbed) == 0.0
    assert run.step(1)
    assert run.metric("norm of weight change")
    assert job.receiver.fates()["applied"] == fates["applied"] + 1


def test_that_a_replay_ends_in_the_same_weights(start: StartReceiver) -> None:
    settings = {"stale": "compensate_adaptive", "compensation": STRENGTH}
    job = start(keep_payloads=True, **settings)
    run = Run(job)
    for age in AGES:
        run.step(age)
    job.receiver.close()
    replay = start("replay", replay=job.receiver.run_dir, **settings)
    for _ in AGES:
        assert replay.step()
    assert largest_difference(weights_of(replay.network), weights_of(job.network)) == 0.0


def test_that_lockstep_keeps_no_weights(start: StartReceiver) -> None:
    run = Run(start(max_staleness=0))
    run.step(0)
    assert run.metric("receiver steps") == 0.0
    assert run.metric("norm of weight change") is None
    assert not run.job.receiver._injector._history._versions


def test_what_is_kept(start: StartReceiver) -> None:
    job = start(max_staleness=2)
    job.network.get_parameter(FROZEN).requires_grad_(False)
    run = Run(job)
    for age in AGES[:-1]:
        run.step(age)
    versions = job.receiver._injector._history._versions
    assert sorted(versions) == [3, 4, 5]
    shared = {name for name in weights_of(job.network) if "h1" not in name}
    assert all(set(version) == shared - {FROZEN} for version in versions.values())
    memory = {tensor.data_ptr() for version in versions.values() for tensor in version.values()}
    run.step(AGES[-1])
    assert sorted(versions) == [4, 5, 6]
    kept = {tensor.data_ptr() for version in versions.values() for tensor in version.values()}
    assert kept == memory, "the oldest version's memory holds the newest one"
