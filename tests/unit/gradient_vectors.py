"""Gradients as explicit vectors, and rules applied to them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from toolkit.aggregation import RULES, Rule

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
