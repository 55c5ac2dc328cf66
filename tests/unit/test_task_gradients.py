"""A backward pass for each task, against the rules written out on whole vectors."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from toolkit.aggregation import find_rule, pcgrad_weights
from toolkit.rotograd import RotateOnly
from toolkit.task_gradients import ByName, RuleBackward, conflict_metrics

NAMES = ("left", "right", "sum")


class Net(nn.Module):
    """Three tasks on one backbone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5))
        self.heads = nn.ModuleList(nn.Linear(5, 1) for _ in NAMES)
        self.double()

    def losses(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(1)
        inputs = torch.randn(7, 4, generator=generator, dtype=torch.float64)
        targets = torch.randn(3, 7, 1, generator=generator, dtype=torch.float64)
        features = self.backbone(inputs)
        return [
            (head(features) - 9 * target).square().mean()
            for head, target in zip(self.heads, targets, strict=True)
        ]


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def gradients(parameters: nn.Module) -> Tensor:
    return flat([parameter.grad for parameter in parameters.parameters()])  # type: ignore[misc]


def by_task(net: Net) -> Tensor:
    """(3, P), the tasks' gradients of the backbone."""
    shared = list(net.backbone.parameters())
    return torch.stack(
        [flat(list(torch.autograd.grad(loss, shared, retain_graph=True))) for loss in net.losses()]
    )


@pytest.mark.parametrize("name", ["sum", "pcgrad", "upgrad", "mgda"])
def test_backbone_by_rule_and_heads_as_they_are(name: str) -> None:
    net = Net()
    rows = by_task(net)
    products = rows @ rows.T
    assert bool((products < 0).any()), "no conflict to resolve"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        weights = find_rule(name)(products)
    sum(net.losses()).backward()  # type: ignore[union-attr]
    heads = gradients(net.heads)
    net.zero_grad()

    backward = RuleBackward(Accelerator(cpu=True), net.backbone, net.heads, find_rule(name))
    state = torch.get_rng_state()
    backward(net.losses(), seed=5)

    torch.testing.assert_close(gradients(net.backbone), weights @ rows, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients(net.heads), heads, rtol=1e-12, atol=1e-12)
    assert torch.equal(torch.get_rng_state(), state)
    measures = backward.measures()
    assert measures["weight/1"] == pytest.approx(float(weights[1]))
    assert measures["grad_norm/2"] == pytest.approx(float(rows[2].norm()))
    cosine = torch.cosine_similarity(rows[0], rows[2], dim=0)
    assert measures["cosine/2_0"] == pytest.approx(float(cosine))


def test_random_choices_follow_the_seed() -> None:
    net = Net()

    def any_weights(products: Tensor) -> Tensor:
        return torch.rand(len(products))

    backward = RuleBackward(Accelerator(cpu=True), net.backbone, net.heads, any_weights)
    found = []
    for seed in (1, 2, 1):
        net.zero_grad()
        backward(net.losses(), seed=seed)
        found.append(gradients(net.backbone))
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])


def test_a_missing_task_has_no_say() -> None:
    net = Net()
    rows = by_task(net)[[0, 2]]
    backward = RuleBackward(Accelerator(cpu=True), net.backbone, net.heads, pcgrad_weights)
    first, _, third = net.losses()
    backward([first, None, third], seed=0)
    expected = pcgrad_weights(rows @ rows.T) @ rows
    torch.testing.assert_close(gradients(net.backbone), expected, rtol=1e-12, atol=1e-12)
    assert all(parameter.grad is None for parameter in net.heads[1].parameters())
    assert backward.measures()["cosine/1_0"] == 0.0


def test_loss_scale() -> None:
    net = Net()
    rows = by_task(net)
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    backward = RuleBackward(accelerator, net.backbone, net.heads, find_rule("mgda"))
    backward(net.losses(), seed=0)
    expected = find_rule("mgda")(rows @ rows.T) @ rows
    torch.testing.assert_close(gradients(net.backbone) / 1024, expected, rtol=1e-10, atol=1e-12)
    assert backward.measures()["grad_norm/0"] == pytest.approx(float(rows[0].norm()))


def test_what_is_not_finite_is_summed() -> None:
    net = Net()
    first, second, third = net.losses()
    backward = RuleBackward(Accelerator(cpu=True), net.backbone, net.heads, pcgrad_weights)
    backward([first, second * torch.inf, third], seed=0)
    assert not bool(gradients(net.backbone).isfinite().all())
    assert [backward.measures()[f"weight/{task}"] for task in range(3)] == [1.0, 1.0, 1.0]


def test_tags() -> None:
    net = Net()
    backward = RuleBackward(Accelerator(cpu=True), net.backbone, net.heads, pcgrad_weights)
    assert conflict_metrics(backward, NAMES) == conflict_metrics(None, NAMES) == {}
    backward(net.losses(), seed=0)
    tags = conflict_metrics(backward, NAMES)
    assert {"gradient/left norm (backbone)", "gradient/sum weight (factor)"} <= tags.keys()
    assert "gradient/cosine left sum (backbone)" in tags
    assert all(type(value) is float for value in tags.values())


def test_tags_of_rotations_and_predictions_by_name() -> None:
    net = Net()
    model = RotateOnly(net.backbone, net.heads, 5).double()
    model.measure_before_rotation = True
    predict = ByName(model, NAMES)
    found = predict(torch.randn(3, 4, dtype=torch.float64), ("sum", "left"))
    assert list(found) == ["sum", "left"]
    sum(one.square().mean() for one in found.values()).backward()
    tags = conflict_metrics(model, NAMES)
    assert "gradient/orthogonality error of rotations" in tags
    assert tags["gradient/cosine left sum (features)"] == pytest.approx(
        tags["gradient/cosine before rotation left sum (features)"]
    )  # at the identity
    assert "gradient/right norm (features)" in tags


def test_that_rotations_rest_where_each_sample_has_one_label() -> None:
    net = Net()
    model = RotateOnly(net.backbone, list(net.heads)[:2], 5).double()
    first, second = model(torch.randn(6, 4, dtype=torch.float64))
    (first[:2].square().mean() + (second[2:] - 1).square().mean()).backward()
    gradient = model.rotations.tangents.grad
    assert gradient is not None
    assert float(gradient.abs().max()) < 1e-15
