"""Weightings of torchjd, where it is installed, and the errors where it or a solver is not."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from toolkit.aggregation import find_rule, guarded_weights, pcgrad_weights, upgrad_weights
from toolkit.aggregation_torchjd import TORCHJD_WEIGHTINGS

SOLVERS = {
    "CAGrad": ["cvxpy", "clarabel"],
    "DualProj": ["quadprog", "qpsolvers"],
    "FairGrad": ["scipy"],
    "UPGrad": ["quadprog", "qpsolvers"],
}
VECTORS = torch.tensor([[2.0, 0.0, 1.0], [-3.0, 1.0, 0.5]], dtype=torch.float64)


def is_installed(*packages: str) -> bool:
    return all(importlib.util.find_spec(package) for package in packages)


needs_torchjd = pytest.mark.skipif(not is_installed("torchjd"), reason="needs torchjd")


def rule_or_skip(name: str) -> Callable[[Tensor], Tensor]:
    if not is_installed("torchjd", *SOLVERS.get(name, [])):
        pytest.skip(f"needs torchjd and {SOLVERS.get(name, [])}")
    return find_rule(f"torchjd:{name}")


@pytest.mark.skipif(is_installed("torchjd"), reason="torchjd is installed")
def test_that_the_extra_is_named() -> None:
    with pytest.raises(
        ValueError, match=r'needs the package torchjd.*"gradient-bridge\[torchjd\]"'
    ):
        find_rule("torchjd:IMTLG")


@needs_torchjd
@pytest.mark.parametrize("name", sorted(SOLVERS))
def test_that_a_missing_solver_is_named(name: str) -> None:
    missing = [package for package in SOLVERS[name] if not is_installed(package)]
    if not missing:
        pytest.skip(f"{SOLVERS[name]} are installed")
    with pytest.raises(ValueError, match=rf"'torchjd:{name}'.*{missing[0]}.*pip install"):
        find_rule(f"torchjd:{name}")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("IMTLGG", r"'torchjd:IMTLGG' is unknown; .*'torchjd:IMTLG'"),
        ("", "'torchjd:' is unknown"),
        ("GradVac", "keeps a state between steps"),
    ],
)
def test_that_other_names_are_refused(name: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        find_rule(f"torchjd:{name}")


@pytest.mark.parametrize("name", TORCHJD_WEIGHTINGS)
def test_weightings_take_a_gramian_of_any_scale(name: str) -> None:
    rule = rule_or_skip(name)
    state = torch.get_rng_state()
    weights = guarded_weights(rule, VECTORS @ VECTORS.T)
    assert torch.equal(torch.get_rng_state(), state)
    assert weights.shape == (2,)
    assert bool((weights > 0).all())
    for vector in VECTORS:
        assert float(weights @ VECTORS @ vector) > -1e-9
    small = VECTORS * 2.0**-20
    scaled = guarded_weights(rule, small @ small.T)
    if name == "FairGrad":  # with alpha = 1 its step does not grow with the gradients
        scaled = scaled * 2.0**-20
    torch.testing.assert_close(scaled, weights, rtol=1e-9, atol=1e-9)


def test_that_fairgrad_solves_its_equation() -> None:
    products = VECTORS @ VECTORS.T * 100
    weights = rule_or_skip("FairGrad")(products)
    torch.testing.assert_close(products @ weights, 1 / weights, rtol=1e-5, atol=0)


@pytest.mark.parametrize("ratio", [1.0, 1e-2, 1e-3])
@pytest.mark.parametrize(("name", "ours"), [("PCGrad", pcgrad_weights), ("UPGrad", upgrad_weights)])
def test_ours_equal_torchjds(name: str, ours: Callable[[Tensor], Tensor], ratio: float) -> None:
    rule = rule_or_skip(name)
    vectors = VECTORS * torch.tensor([[1.0], [ratio]], dtype=torch.float64)
    found, theirs = ours(vectors @ vectors.T), rule(vectors @ vectors.T)
    torch.testing.assert_close(found, theirs, rtol=1e-4, atol=0)


def test_ours_equal_torchjds_of_four() -> None:
    rule = rule_or_skip("UPGrad")
    generator = torch.Generator().manual_seed(3)
    vectors = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    assert float((vectors @ vectors.T).min()) < 0
    products = vectors @ vectors.T
    torch.testing.assert_close(upgrad_weights(products), rule(products), rtol=1e-6, atol=1e-8)
    shortest, theirs = find_rule("mgda")(products), rule_or_skip("MGDA")(products)
    norm = float((shortest @ vectors).norm())
    assert norm <= float((theirs @ vectors).norm()) <= 1.1 * norm  # theirs stops early
