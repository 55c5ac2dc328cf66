"""Every rule against its definition on explicit vectors."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.unit.gradient_vectors import CONFLICT, combined, gradients, of, some, two
from toolkit.aggregation import (
    find_rule,
    gramian,
    mgda_weights,
    pcgrad_weights,
    protect_weights,
    upgrad_weights,
)

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
