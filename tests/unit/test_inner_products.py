"""Inner products in pieces: against float64, where float32 over- and underflows, of any dtype."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from toolkit.inner_products import (
    all_finite,
    inner_products,
    squared_distance,
    squared_norm,
)

PAIRS = [(0, 0), (0, 1), (1, 1)]


@pytest.mark.parametrize("shape", [(), (0,), (5,), (3, 7), (2**16,), (300, 1000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_that_they_are_those_of_float64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))

    found = inner_products([one, other], PAIRS)

    wide = [tensor.double().flatten() for tensor in (one, other)]
    expected = torch.stack([wide[i] @ wide[j] for i, j in PAIRS])
    assert found.dtype == torch.float64
    scale = float(expected.max()) if expected.numel() else 0.0
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    assert float((found - expected).abs().max()) <= tolerance * scale


@pytest.mark.parametrize("value", [1e-30, 1e-20, 1e25, 3e38])
def test_values_whose_squares_float32_cannot_hold(value: float) -> None:
    tensor = torch.full((70_000,), value)

    exact = 70_000 * float(tensor[0]) ** 2
    assert squared_norm([tensor]) == pytest.approx(exact, rel=1e-6)
    assert inner_products([tensor, -tensor], PAIRS).tolist() == pytest.approx(
        [exact, -exact, exact], rel=1e-6
    )


def test_a_small_piece_beside_a_large_one() -> None:
    tensor = torch.cat([torch.ones(2**16), torch.full((2**16,), 1e-25)])

    assert squared_norm([tensor]) == pytest.approx(2**16)
    assert squared_norm([tensor[2**16 :]]) == pytest.approx(2**16 * 1e-50, rel=1e-6)


def test_views_that_are_not_contiguous() -> None:
    tensor = torch.arange(12.0).reshape(3, 4)

    assert squared_norm([tensor.t(), tensor[:, ::2]]) == 506.0 + 220.0


def test_the_squared_norm() -> None:
    assert squared_norm([]) == 0.0
    assert squared_norm([torch.tensor([3.0, 4.0]), torch.tensor(2.0)]) == 29.0
    assert squared_norm([nn.Parameter(torch.ones(2))]) == 2.0
    assert squared_norm(torch.ones(1, dtype=torch.bfloat16) for _ in range(1000)) == 1000.0
    assert squared_norm([torch.full((1,), 1e30)]) == pytest.approx(1e60)
    assert math.isnan(squared_norm([torch.tensor([math.nan])]))


@pytest.mark.parametrize("shape", [(), (0,), (3, 7), (2**16 + 1,), (300, 1000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_squared_distance(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(shape, generator=generator).to(dtype)
    other = one + 1e-3 * torch.randn(shape, generator=generator).to(dtype)

    exact = float((one - other).double().square().sum())
    assert squared_distance(one, other) == pytest.approx(exact, rel=1e-6)
    assert squared_distance(one, one) == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 69_999])
def test_that_one_bad_value_is_seen(dtype: torch.dtype, bad: float, place: int) -> None:
    tensor = torch.ones(70_000, dtype=dtype)
    assert all_finite([tensor, tensor])
    tensor[place] = bad

    assert not all_finite([torch.ones(2), tensor])


def test_that_large_values_are_finite() -> None:
    assert all_finite([torch.full((3,), 1e300, dtype=torch.float64), torch.full((3,), 3e38)])
    assert all_finite([torch.tensor([2**62]), torch.tensor([True]), torch.empty(0)])
