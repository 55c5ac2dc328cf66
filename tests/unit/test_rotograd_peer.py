"""Our gradients against those of the package ``rotograd`` of the paper's authors.

Needs version 0.1.5.2 with geotorch 0.3 (``pip install -e ".[peers]"``). The comparison of the
cooperative mode needs 0.1.4, the last version that had it.
"""

from __future__ import annotations

import copy
import importlib.metadata
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.unit.rotograd_oracle import SIZE, build, data, gradients_of, losses_of
from toolkit.rotograd import RotateOnly, RotoGrad, RotoGradNorm

peer: Any = pytest.importorskip("rotograd", exc_type=ImportError)
VERSION = tuple(int(part) for part in importlib.metadata.version("rotograd").split("."))
NUM_SAMPLES, NUM_STEPS = 16, 25
FACTOR = NUM_SAMPLES**1.5 / 2  # over m: see toolkit/rotograd/gradients.py


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Peer:
    """The package's model beside ours."""

    def __init__(self, model: Any) -> None:
        self.model = model
        options = {"alpha": model.alpha} if isinstance(model, RotoGradNorm) else {}
        self.backbone, self.heads = copy.deepcopy((model.backbone, list(model.heads)))
        kind = getattr(peer, type(model).__name__)
        self.twin = kind(self.backbone, list(self.heads), SIZE, **options).double().train()
        tasks = range(len(model))
        self.rotations = [getattr(self.twin.parametrizations, f"rotation_{k}") for k in tasks]

    @torch.no_grad()
    def follow(self) -> None:
        """Take over our weights, and our rotations as the base of its own."""
        self.backbone.load_state_dict(self.model.backbone.state_dict())
        for mine, its in zip(self.model.heads, self.heads, strict=True):
            its.load_state_dict(mine.state_dict())
        for matrix, rotation in zip(self.model.rotations.matrices, self.rotations, strict=True):
            rotation.original.zero_()
            rotation[0].base.copy_(matrix)
        if isinstance(self.model, RotoGradNorm):
            for raw, weight in zip(self.model.raw_weights, self.twin.weight_, strict=True):
                weight.copy_(raw)

    def backward(self, inputs: Tensor) -> list[Tensor]:
        """Its gradients of backbone and heads, and of the weights if any."""
        for module in (self.twin, self.backbone, *self.heads):
            module.zero_grad()
        with peer.cached():
            self.twin.backward(losses_of(self.twin(inputs), inputs))
        network = [p.grad for module in (self.backbone, *self.heads) for p in module.parameters()]
        weights = isinstance(self.model, RotoGradNorm)
        return [*network, *([torch.stack([w.grad for w in self.twin.weight_])] if weights else [])]

    def tangents(self) -> Tensor:
        """Its gradients of the rotations."""
        return torch.stack([rotation.original.grad.tril(-1) for rotation in self.rotations])


def our_backward(model: Any, inputs: Tensor) -> list[Tensor]:
    model.zero_grad()
    model.backward(losses_of(model(inputs), inputs))
    network = [p.grad for module in (model.backbone, model.heads) for p in module.parameters()]
    return [*network, *([model.raw_weights.grad] if isinstance(model, RotoGradNorm) else [])]


def tangents(model: Any) -> Tensor:
    grad = gradients_of(model)["rotations.tangents"]
    assert grad is not None
    return grad


def close(mine: Tensor, its: Tensor) -> None:
    torch.testing.assert_close(mine, its, rtol=0, atol=1e-6 * its.abs().max().item())


@pytest.mark.skipif(VERSION != (0, 1, 5, 2), reason="the version that is followed is 0.1.5.2")
@pytest.mark.parametrize("kind", [RotateOnly, RotoGrad, RotoGradNorm])
def test_that_gradients_are_the_packages(kind: type[RotateOnly]) -> None:
    model = build(kind)
    other = Peer(model)
    optimizer = torch.optim.Adam(model.param_groups(lr=1e-2, lr_rotation=1e-2))
    for step in range(NUM_STEPS):
        other.follow()
        inputs = data(step, NUM_SAMPLES)
        pairs = zip(our_backward(model, inputs), other.backward(inputs), strict=True)
        for mine, its in pairs:
            close(mine, its)
        measures = model.measures()
        norms = torch.tensor([measures[f"grad_norm/{k}"] for k in range(3)])
        inner = sum(
            measures[f"cosine/{j}_{k}"] * norms[j] * norms[k] for j, k in ((1, 0), (2, 0), (2, 1))
        )
        mean_norm = (norms.square().sum() + 2 * inner).sqrt() / 3
        close(tangents(model) * mean_norm, other.tangents() * FACTOR)
        optimizer.step()
    assert model.completed_steps == NUM_STEPS > model.burn_in_period


@pytest.mark.skipif(VERSION != (0, 1, 4), reason="the last version with coop is 0.1.4")
def test_that_cooperation_is_the_packages() -> None:
    model = build(RotoGradNorm, alpha=0.0).coop()
    other = Peer(model)
    other.twin.coop(True)
    optimizer = torch.optim.Adam(model.param_groups(lr=1e-2, lr_rotation=1e-2))
    for step in range(NUM_STEPS):
        other.follow()
        inputs = data(step, NUM_SAMPLES)
        our_backward(model, inputs)
        other.backward(inputs)
        for mine, its in zip(tangents(model), other.tangents(), strict=True):
            close(mine / mine.norm(), its / its.norm())
        optimizer.step()
