"""What every rule promises about conflict, and what guards it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.unit.gradient_vectors import (
    AGREEMENT,
    CONFLICT,
    check_no_conflict,
    combined,
    each_rule,
    of,
    some,
    two,
)
from toolkit.aggregation import (
    RULES,
    Rule,
    guarded_weights,
    mgda_weights,
    pcgrad_weights,
    protect_weights,
    upgrad_weights,
)


@settings(deadline=None)
@given(two)
def test_pcgrad_of_two_conflicts_with_neither(vectors: Tensor) -> None:
    check_no_conflict(combined(pcgrad_weights, vectors), vectors)


@settings(deadline=None)
@given(some)
def test_upgrad_conflicts_with_none(vectors: Tensor) -> None:
    check_no_conflict(combined(upgrad_weights, vectors), vectors)


@settings(deadline=None)
@given(some)
def test_mgda_conflicts_with_none(vectors: Tensor) -> None:
    check_no_conflict(combined(mgda_weights, vectors), vectors)


@pytest.mark.parametrize("ratio", [1.0, 1e-2, 1e-4, 1e-8])
@pytest.mark.parametrize("rule", ["pcgrad", "upgrad", "mgda"])
def test_that_a_short_gradient_is_not_run_over(rule: str, ratio: float) -> None:
    vectors = CONFLICT * torch.tensor([[1.0], [ratio]], dtype=torch.float64)
    direction = combined(RULES[rule], vectors)
    for vector in vectors:
        cosine = direction @ vector / (direction.norm() * vector.norm())
        assert float(cosine) > -1e-9


def test_that_the_sum_does_conflict() -> None:
    """Without this the tests above might say nothing."""
    assert float(combined(RULES["sum"], CONFLICT) @ CONFLICT[0]) < 0


@each_rule
def test_what_is_left_without_conflict(rule: Rule) -> None:
    weights = rule(of(AGREEMENT)).tolist()
    if rule is upgrad_weights:
        assert weights == [0.5, 0.5]
    elif rule is not mgda_weights:
        assert weights == [1.0, 1.0]


@each_rule
@settings(deadline=None)
@given(vectors=two, exponent=st.integers(-20, 20))
def test_that_a_common_scale_changes_no_weight(rule: Rule, vectors: Tensor, exponent: int) -> None:
    scaled = rule(of(vectors * 2.0**exponent))
    torch.testing.assert_close(scaled, rule(of(vectors)), rtol=1e-9, atol=1e-12)


@settings(deadline=None)
@given(two, st.sampled_from([1e-3, 0.1, 10.0]))
def test_that_upgrads_projections_ignore_the_others_length(vectors: Tensor, factor: float) -> None:
    other = vectors * torch.tensor([[1.0], [factor]], dtype=torch.float64)
    first, scaled = upgrad_weights(of(vectors)), upgrad_weights(of(other))
    # linear under scaling: what comes of a projection of one depends on its own length alone
    torch.testing.assert_close(
        (scaled[0] - 0.5) / factor, first[0] - 0.5, rtol=1e-6, atol=1e-9 * float(first.abs().max())
    )


# -- guards ----------------------------------------------------------------------------------


@each_rule
@pytest.mark.parametrize("absent", [[0], [1], [0, 1]])
def test_that_a_zero_gradient_leaves_the_other_as_it_is(rule: Rule, absent: list[int]) -> None:
    vectors = CONFLICT.clone()
    vectors[absent] = 0.0
    assert guarded_weights(rule, of(vectors)).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("rule", ["pcgrad", "upgrad", "mgda"])
def test_that_a_zero_gradient_among_many_is_left_out(rule: str) -> None:
    vectors = torch.cat([torch.zeros(1, 3, dtype=torch.float64), CONFLICT])
    weights = guarded_weights(RULES[rule], of(vectors))
    assert weights.tolist() == [1.0, *RULES[rule](of(CONFLICT)).tolist()]


@each_rule
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_that_non_finite_products_leave_the_sum(rule: Rule, bad: float) -> None:
    for i, j in ((0, 0), (0, 1), (1, 1)):
        products = of(CONFLICT)
        products[i, j] = products[j, i] = bad
        assert guarded_weights(rule, products).tolist() == [1.0, 1.0]


def test_that_non_finite_weights_leave_the_sum() -> None:
    products = torch.tensor([[1e300, -1e-5], [-1e-5, 5e-324]], dtype=torch.float64)
    assert not bool(pcgrad_weights(products).isfinite().all())
    assert guarded_weights(pcgrad_weights, products).tolist() == [1.0, 1.0]


def test_opposite_gradients_cancel() -> None:
    vectors = torch.tensor([[1.0, 2.0], [-0.5, -1.0]], dtype=torch.float64)
    for name in ("pcgrad", "upgrad", "mgda"):
        assert float(combined(RULES[name], vectors).norm()) < 1e-15
    assert torch.equal(combined(protect_weights, vectors), vectors[0])
