"""Every rule against its definition on explicit vectors, and what it promises about conflict."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from toolkit.aggregation import (
    RULES,
    Rule,
    find_rule,
    gramian,
    guarded_weights,
    mgda_weights,
    pcgrad_weights,
    protect_weights,
    upgrad_weights,
)

CONFLICT = torch.tensor([[2.0, 0.0, 1.0], [-3.0, 1.0, 0.5]], dtype=torch.float64)
AGREEMENT = torch.tensor([[2.0, 0.0, 1.0], [1.0, -4.0, 0.5]], dtype=torch.float64)

each_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


@st.composite
def gradients(draw: st.DrawFn, sizes: st.SearchStrategy[int]) -> Tensor:
    """K vectors of dimension 3 or 6, of lengths up to 1e6 apart, often in conflict."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    size, dimension = draw(sizes), draw(st.sampled_from([3, 6]))
    directions = torch.randn(size, dimension, generator=generator, dtype=torch.float64)
    lengths = [10.0 ** draw(st.integers(-3, 3)) for _ in range(size)]
    return directions * torch.tensor(lengths, dtype=torch.float64)[:, None]


two, some = gradients(st.just(2)), gradients(st.integers(2, 5))


def of(vectors: Tensor) -> Tensor:
    return vectors @ vectors.T


def combined(rule: Rule, vectors: Tensor) -> Tensor:
    return rule(of(vectors)) @ vectors


def check_no_conflict(direction: Tensor, vectors: Tensor) -> None:
    """No inner product is negative, but for rounding in weights and Gramian."""
    for vector in vectors:
        rounding = 1e-9 * float(vector.norm()) * float(vectors.norm(dim=1).max())
        assert float(direction @ vector) >= -rounding


# -- definitions, on vectors -----------------------------------------------------------------


def pcgrad_by_vectors(vectors: Tensor, orders: list[list[int]]) -> Tensor:
    total = torch.zeros_like(vectors[0])
    for i, order in enumerate(orders):
        projected = vectors[i].clone()
        for j in order:
            if projected @ vectors[j] < 0:
                projected = (
                    projected - (projected @ vectors[j]) / (vectors[j] @ vectors[j]) * vectors[j]
                )
        total = total + projected
    return total


def onto_dual_cone(point: Tensor, vectors: Tensor) -> Tensor:
    """The nearest point whose product with no vector is negative: the best of all faces."""
    best, distance = torch.zeros_like(point), math.inf
    unit = vectors / vectors.norm(dim=1, keepdim=True)
    for size in range(len(vectors) + 1):
        for face in itertools.combinations(range(len(vectors)), size):
            candidate = point
            if face:
                basis = torch.linalg.qr(unit[list(face)].T).Q  # orthogonal to all of the face
                candidate = point - basis @ (basis.T @ point)
            tolerance = 1e-10 * float(point.norm())
            found = float((candidate - point).norm())
            if found < distance and bool((unit @ candidate >= -tolerance).all()):
                best, distance = candidate, found
    return best


@settings(deadline=None)
@given(two)
def test_pcgrad_of_two_is_its_definition(vectors: Tensor) -> None:
    expected = pcgrad_by_vectors(vectors, [[1], [0]])
    torch.testing.assert_close(combined(pcgrad_weights, vectors), expected, rtol=1e-9, atol=1e-9)


@settings(deadline=None)
@given(gradients(st.integers(3, 5)), st.integers(0, 2**32))
def test_pcgrad_of_many_draws_an_order_for_each(vectors: Tensor, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    found = pcgrad_weights(of(vectors), generator) @ vectors
    generator.manual_seed(seed)
    orders = []
    for i in range(len(vectors)):
        others = [j for j in range(len(vectors)) if j != i]
        drawn = torch.randperm(len(others), generator=generator).tolist()
        orders.append([others[k] for k in drawn])
    expected = pcgrad_by_vectors(vectors, orders)
    scale = float(vectors.norm(dim=1).max())
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9 * scale)


@settings(deadline=None)
@given(gradients(st.integers(2, 4)))
def test_upgrad_is_the_mean_of_projections(vectors: Tensor) -> None:
    # Of up to three independent vectors, or four in six dimensions, the faces are independent.
    vectors = vectors[: vectors.shape[1]]
    expected = torch.stack([onto_dual_cone(vector, vectors) for vector in vectors]).mean(dim=0)
    scale = float(vectors.norm(dim=1).max())
    found = combined(upgrad_weights, vectors)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6 * scale)


@settings(deadline=None)
@given(some)
def test_mgda_is_the_shortest_convex_combination(vectors: Tensor) -> None:
    weights = mgda_weights(of(vectors))
    shortest = weights @ vectors
    assert bool((weights >= 0).all())
    assert float(weights.sum()) == pytest.approx(1.0)
    # necessary and sufficient: <x, g_i> >= <x, x> for all i
    slack = 1e-9 * float(vectors.norm(dim=1).max()) ** 2
    assert bool((vectors @ shortest >= shortest @ shortest - slack).all())


@pytest.mark.parametrize(
    ("vectors", "weights"),
    [
        (CONFLICT, None),
        ([[1.0, 0.0], [2.0, 0.5]], [1.0, 0.0]),  # the first is the shortest
        ([[2.0, 0.5], [1.0, 0.0]], [0.0, 1.0]),
        ([[1.0, 1.0], [1.0, 1.0]], [0.5, 0.5]),  # any would do
    ],
    ids=["between", "first", "second", "equal"],
)
def test_mgda_of_two_by_search(vectors: Tensor | list[list[float]], weights: list[float]) -> None:
    vectors = torch.as_tensor(vectors, dtype=torch.float64)
    steps = torch.linspace(0, 1, 100_001, dtype=torch.float64)[:, None]
    norms = (steps * vectors[0] + (1 - steps) * vectors[1]).norm(dim=1)
    found = mgda_weights(of(vectors))
    assert float((found @ vectors).norm()) == pytest.approx(float(norms.min()), abs=1e-8)
    if weights is None:
        assert float(found[0]) == pytest.approx(float(steps[norms.argmin()]), abs=1e-5)
    else:
        assert found.tolist() == weights


@settings(deadline=None)
@given(two)
def test_protect_projects_the_second_only(vectors: Tensor) -> None:
    own, donor = vectors
    if own @ donor < 0:
        donor = donor - (own @ donor) / (own @ own) * own
    expected, found = own + donor, combined(protect_weights, vectors)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9 * float(vectors.norm()))
    assert float(found @ own) >= float(own @ own) * (1 - 1e-9)


def test_that_protect_adds_each_other_one_off_the_first() -> None:
    first, against, along = torch.tensor(
        [[2.0, 0.0, 0.0], [-1.0, 1.0, 0.0], [1.0, 0.0, 1.0]], dtype=torch.float64
    )
    weights = protect_weights(gramian([[first], [against], [along]]))

    found = weights[0] * first + weights[1] * against + weights[2] * along
    assert torch.equal(found, torch.tensor([3.0, 1.0, 1.0], dtype=torch.float64))


@settings(deadline=None)
@given(two)
def test_that_the_closed_forms_are_the_general_ones(vectors: Tensor) -> None:
    """A third gradient far away, orthogonal to both, sends two through the general way."""
    size, dimension = len(vectors), vectors.shape[1]
    wide = torch.zeros(size + 1, dimension + 1, dtype=torch.float64)
    wide[:size, :dimension] = vectors
    wide[size, dimension] = float(vectors.norm())
    pair = combined(upgrad_weights, vectors) * size
    general = combined(upgrad_weights, wide)[:dimension] * (size + 1)
    scale = float(vectors.norm(dim=1).max())
    torch.testing.assert_close(general, pair, rtol=1e-6, atol=1e-7 * scale)


# -- promises --------------------------------------------------------------------------------


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


# -- Gramian, names --------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_the_gramian_of_lists_of_tensors(dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 4), (5,), ()]
    parts: list[list[Tensor | None]] = [
        [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes] for _ in range(3)
    ]
    parts[1][0] = parts[2][0] = parts[0][1] = parts[1][1] = parts[2][1] = None
    rows = torch.zeros(3, 18, dtype=torch.float64)
    for row, tensors in zip(rows, parts, strict=True):
        for tensor, piece in zip(tensors, row.split([12, 5, 1]), strict=True):
            if tensor is not None:
                piece.copy_(tensor.flatten())
    found = gramian(parts)
    torch.testing.assert_close(found, rows @ rows.T, rtol=tolerance, atol=tolerance)
    assert torch.equal(found, found.T)
    assert gramian([[], []]).tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_that_the_gramian_neither_overflows_nor_underflows_in_single_precision() -> None:
    huge, tiny = torch.full((4,), 1e30), torch.full((4,), 1e-30)
    assert gramian([[huge], [tiny]]).diagonal().tolist() == pytest.approx([4e60, 4e-60], rel=1e-6)


def test_that_an_unknown_rule_is_named() -> None:
    with pytest.raises(ValueError, match=r"'pcgard' is unknown; .*'sum', 'pcgrad'.*AlignedMTL"):
        find_rule("pcgard")
