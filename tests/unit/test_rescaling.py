"""Every rule against the gradient of the joint loss that it stands for."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.unit.rescaled import SETTINGS, each_setting, two_factors
from toolkit.bridge.rescaling import (
    LOSS_REDUCTIONS,
    RESCALE_RULES,
    LossReduction,
    RescaleRule,
    check_rule,
)

counts = st.floats(min_value=1e-3, max_value=1e6)
weights = st.floats(min_value=0.0, max_value=1e3)


def data(num_samples: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(num_samples, 4, generator=generator, dtype=torch.float64)
    return features, torch.randn(num_samples, generator=generator, dtype=torch.float64)


def own_losses(w: Tensor, features: Tensor, targets: Tensor) -> Tensor:
    return (features @ w - targets).square()


def donor_losses(w: Tensor, features: Tensor, targets: Tensor) -> Tensor:
    return (features @ w - targets).cosh()  # another task: not the same function


def joint_loss(
    rule: RescaleRule, reduction: LossReduction, own: Tensor, donor: Tensor, weight: float
) -> Tensor:
    """The loss of one joint step, as a user would write it."""
    if rule == "match":
        mean = own.mean() + weight * donor.mean()
        return mean if reduction == "mean" else mean * len(own)
    union = torch.cat([own, weight * donor])
    if rule == "pool":
        return union.mean()
    return union.sum() / len(own) if reduction == "mean" else union.sum()


@each_setting
@pytest.mark.parametrize(("num_own", "num_donor"), [(5, 5), (3, 11), (7, 2), (1, 1)])
@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_that_the_step_is_the_joint_gradient(
    rule: RescaleRule, reduction: LossReduction, num_own: int, num_donor: int, weight: float
) -> None:
    w = torch.linspace(-1, 1, 4, dtype=torch.float64, requires_grad=True)
    own = own_losses(w, *data(num_own, 1))
    donor = donor_losses(w, *data(num_donor, 2))
    (own_sum,) = torch.autograd.grad(own.sum(), w, retain_graph=True)
    (donor_sum,) = torch.autograd.grad(donor.sum(), w, retain_graph=True)
    (joint,) = torch.autograd.grad(joint_loss(rule, reduction, own, donor, weight), w)

    own_factor, donor_factor = two_factors(rule, reduction, num_own, num_donor, weight)

    torch.testing.assert_close(
        own_factor * own_sum + donor_factor * donor_sum, joint, rtol=1e-13, atol=1e-13
    )


@pytest.mark.parametrize(
    ("rule", "reduction", "factors"),
    [
        ("match", "mean", (1 / 6, 0.5 / 3)),
        ("match", "sum", (1.0, 0.5 * 6 / 3)),
        ("append", "mean", (1 / 6, 0.5 / 6)),
        ("append", "sum", (1.0, 0.5)),
        ("pool", "mean", (1 / 9, 0.5 / 9)),
    ],
)
def test_the_factors_by_hand(
    rule: RescaleRule, reduction: LossReduction, factors: tuple[float, float]
) -> None:
    assert two_factors(rule, reduction, 6, 3, 0.5) == pytest.approx(factors, rel=1e-15)


@each_setting
def test_that_payloads_of_one_version_add(rule: RescaleRule, reduction: LossReduction) -> None:
    w = torch.linspace(-1, 1, 4, dtype=torch.float64, requires_grad=True)
    features, targets = data(8, 3)
    (whole,) = torch.autograd.grad(donor_losses(w, features, targets).sum(), w)
    parts = [
        torch.autograd.grad(donor_losses(w, features[part], targets[part]).sum(), w)[0]
        for part in (slice(0, 3), slice(3, 8))
    ]

    _, factor = two_factors(rule, reduction, 5, 3 + 5)

    _, whole_factor = two_factors(rule, reduction, 5, 8)
    torch.testing.assert_close(factor * (parts[0] + parts[1]), whole_factor * whole)


@each_setting
@given(num_own=counts, num_donor=counts, weight=weights, times=st.floats(0.0, 10.0))
def test_that_the_donors_factor_is_linear_in_its_weight(
    rule: RescaleRule,
    reduction: LossReduction,
    num_own: float,
    num_donor: float,
    weight: float,
    times: float,
) -> None:
    own, donor = two_factors(rule, reduction, num_own, num_donor, weight)
    same_own, scaled = two_factors(rule, reduction, num_own, num_donor, weight * times)

    assert same_own == own > 0
    assert scaled == pytest.approx(times * donor, rel=1e-12, abs=1e-300)


@each_setting
@given(num_own=counts, num_donor=counts, times=st.floats(0.01, 100.0))
def test_how_the_factors_follow_the_unit_of_the_count(
    rule: RescaleRule, reduction: LossReduction, num_own: float, num_donor: float, times: float
) -> None:
    factors = two_factors(rule, reduction, num_own, num_donor)
    other_unit = two_factors(rule, reduction, num_own * times, num_donor * times)

    expected = [factor / (times if reduction == "mean" else 1.0) for factor in factors]
    assert other_unit == pytest.approx(tuple(expected), rel=1e-12)


@each_setting
@given(num_own=counts, weight=weights)
def test_that_no_donor_samples_leave_the_receivers_own_step(
    rule: RescaleRule, reduction: LossReduction, num_own: float, weight: float
) -> None:
    own, donor = two_factors(rule, reduction, num_own, 0, weight)

    assert donor == 0
    assert own == (1.0 if reduction == "sum" else 1.0 / num_own)


@given(num_donor=counts, weight=weights)
def test_that_no_own_samples_leave_the_donors_part_where_it_is_defined(
    num_donor: float, weight: float
) -> None:
    assert two_factors("match", "mean", 0, num_donor, weight) == (0, weight / num_donor)
    assert two_factors("pool", "mean", 0, num_donor, weight) == (0, weight / num_donor)
    assert two_factors("append", "sum", 0, num_donor, weight) == (0, weight)
    assert two_factors("match", "sum", 0, num_donor, weight) == (0, 0)
    with pytest.raises(ValueError, match="'append' divides by the receiver's number of samples"):
        two_factors("append", "mean", 0, num_donor, weight)


@each_setting
def test_that_no_samples_at_all_are_no_step(rule: RescaleRule, reduction: LossReduction) -> None:
    assert two_factors(rule, reduction, 0, 0) == (0, 0)


def test_that_the_settings_are_all_there_are() -> None:
    allowed = [(rule, reduction) for rule in RESCALE_RULES for reduction in LOSS_REDUCTIONS]

    assert {*SETTINGS, ("pool", "sum")} == set(allowed)


def test_that_pool_refuses_a_sum_loss() -> None:
    with pytest.raises(ValueError, match=r"'pool'.*no meaning for a sum loss; use 'append'"):
        check_rule("pool", "sum")
    with pytest.raises(ValueError, match="'pool'"):
        two_factors("pool", "sum", 3, 4)


def test_that_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'plain' is unknown.*'match', 'append', 'pool'"):
        two_factors("plain", "mean", 3, 4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"'none' is unknown.*'mean', 'sum'"):
        two_factors("match", "none", 3, 4)  # type: ignore[arg-type]


@each_setting
@pytest.mark.parametrize("count", [-1, -1e-9, math.nan, math.inf, -math.inf])
def test_that_impossible_counts_are_refused_by_name(
    rule: RescaleRule, reduction: LossReduction, count: float
) -> None:
    with pytest.raises(ValueError, match="num_own must be finite and not negative"):
        two_factors(rule, reduction, count, 4)
    with pytest.raises(ValueError, match=r"num_donor\[.h2.\] must be finite and not negative"):
        two_factors(rule, reduction, 4, count)
