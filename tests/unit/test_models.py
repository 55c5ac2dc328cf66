"""The small network: shapes, shared initial weights, independence of samples."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from toolkit.models import ConditionalPerceptron, build_model


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 12, 12), (3, 28, 30), (1, 4, 5), (3, 33, 7)])
def test_logits_by_head(shape: tuple[int, int, int]) -> None:
    model = build_model(shape, {"h1": 10, "h2": 5}, seed=0)
    logits = model(torch.rand(3, *shape))
    assert {head: value.shape for head, value in logits.items()} == {"h1": (3, 10), "h2": (3, 5)}


def test_size() -> None:
    model = build_model((1, 8, 8), {"h1": 10, "h2": 5}, seed=0)
    assert 20_000 <= sum(parameter.numel() for parameter in model.parameters()) <= 40_000


def test_heads_left_out_get_no_gradient() -> None:
    model = build_model((1, 8, 8), {"h1": 10, "h2": 5}, seed=0)
    logits = model(torch.rand(3, 1, 8, 8), ["h2"])
    assert list(logits) == ["h2"]
    logits["h2"].sum().backward()
    assert all(parameter.grad is None for parameter in model.heads["h1"].parameters())
    assert all(parameter.grad is not None for parameter in model.backbone.parameters())


def test_unknown_head() -> None:
    with pytest.raises(KeyError, match="h3"):
        build_model((1, 8, 8), {"h1": 10}, seed=0)(torch.rand(1, 1, 8, 8), ["h3"])


def test_common_parts_begin_alike_and_global_state_stays() -> None:
    before = torch.random.get_rng_state()
    both = build_model((1, 8, 8), {"h1": 10, "h2": 5}, seed=7).state_dict()
    donor = build_model((1, 8, 8), {"h2": 5}, seed=7).state_dict()
    other = build_model((1, 8, 8), {"h2": 5}, seed=8).state_dict()
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(both[name], tensor) for name, tensor in donor.items())
    assert not any(torch.equal(other[name], tensor) for name, tensor in donor.items())


def test_samples_do_not_see_each_other() -> None:
    model = build_model((1, 8, 8), {"h1": 10}, seed=0).double()
    images = torch.rand(5, 1, 8, 8, dtype=torch.float64)
    alone = torch.cat([model(image[None])["h1"] for image in images])
    torch.testing.assert_close(model(images)["h1"], alone, rtol=0, atol=1e-14)


def test_images_too_small() -> None:
    with pytest.raises(ValueError, match="at least 4"):
        build_model((1, 3, 8), {"h1": 10}, seed=0)


def test_that_a_conditional_perceptron_heeds_the_class() -> None:
    torch.manual_seed(0)
    model = ConditionalPerceptron(3, 4, 8, 2, nn.Tanh()).double()
    inputs = torch.randn(1, 3, dtype=torch.float64).expand(4, 3)

    outputs = model(inputs, torch.arange(4)).detach()

    assert outputs.shape == (4, 2)
    assert len({tuple(row) for row in outputs.tolist()}) == 4
    assert float(outputs.abs().max()) < 1
