"""The public face of RotoGrad: parts, parameters, bad input, measures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from tests.unit.rotograd_oracle import SIZE, backbone, build, data, heads, losses_of
from toolkit import rotograd
from toolkit.rotograd import RotateOnly, RotoGrad, RotoGradNorm, VanillaMTL


def test_the_published_example() -> None:
    """The package's README, but for its parameter groups."""
    body, (head1, head2), size_z = backbone(), heads(2), SIZE
    model = RotoGradNorm(body, [head1, head2], size_z, alpha=1.0)
    assert model.backbone is body
    assert model.heads[1] is head2
    optim_model = torch.optim.Adam(
        [{"params": m.parameters()} for m in [body, head1, head2]], lr=1e-3
    )
    optim_rotograd = torch.optim.Adam(model.rotation_parameters(), lr=5e-4)
    x = data(0, dtype=torch.float32)
    before = [parameter.clone() for parameter in model.parameters()]
    model.train()
    for _ in range(3):
        optim_model.zero_grad()
        optim_rotograd.zero_grad()
        with rotograd.cached():
            pred1, pred2 = model(x)
            loss1, loss2 = pred1.square().mean(), (pred2 - 1).square().mean()
            model.backward([loss1, loss2])
        optim_model.step()
        optim_rotograd.step()
    assert model.completed_steps == 3
    moved = dict(zip(dict(model.named_parameters()), before, strict=True))
    still = [n for n, p in model.named_parameters() if torch.equal(p, moved[n])]
    assert still == ["rotations.tangents"]  # the matrices have taken it up


@pytest.mark.parametrize("training", [True, False])
def test_the_model_of_one_task(training: bool) -> None:
    model = build(RotoGrad).train(training)
    for index in (0, 2, -1):
        task = model[index]
        assert task.training == training
        torch.testing.assert_close(task(data(0)), model(data(0))[index])
    assert {id(p) for p in task.head.parameters()} == {id(p) for p in model.heads[2].parameters()}
    task(data(0)).sum().backward()
    assert model.backbone[0].weight.grad is not None
    assert model.rotations.tangents.grad is None
    optimizer = torch.optim.Adam(model.param_groups(lr=1e-2, lr_rotation=0.1))
    model.train().backward(losses_of(model(data(0)), data(0)))
    optimizer.step()
    torch.testing.assert_close(task(data(1)), model(data(1))[2])  # the same memory
    assert len(model) == 3
    with pytest.raises(IndexError, match="no task 3"):
        model[3]


def test_parameter_groups() -> None:
    model = build(RotoGradNorm)
    network, rotations = model.param_groups(lr=1e-3, lr_rotation=5e-4)
    assert rotations["params"] == [model.rotations.tangents, model.raw_weights]
    trained = {id(p) for group in (network, rotations) for p in group["params"]}
    assert trained == {id(p) for p in model.parameters()} - {id(model.rotations.matrices)}
    vanilla = VanillaMTL(backbone(), heads(2))
    (group,) = vanilla.param_groups(lr=1e-3, lr_rotation=5e-4)
    assert group["params"] == list(vanilla.parameters())


def test_that_unfreezing_all_leaves_the_matrices_frozen() -> None:
    """Else an optimizer moves them off the rotations, and DDP waits for their gradient."""
    model = build(RotoGrad).requires_grad_(False).requires_grad_(True)
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["rotations.matrices"]
    for parameter in model.parameters():
        parameter.requires_grad = True
    for training in (True, False):
        torch.stack(losses_of(model.train(training)(data(0)), data(0))).sum().backward()
    assert model.rotations.matrices.grad is None


def test_vanilla_is_the_plain_sum() -> None:
    model = build(RotateOnly)
    vanilla = VanillaMTL(model.backbone, tuple(model.heads))
    z = model.backbone(data(0))
    expected = torch.stack(losses_of([head(z) for head in model.heads], data(0))).sum()
    losses = losses_of(vanilla(data(0)), data(0))
    torch.testing.assert_close(vanilla.total(losses), expected)
    torch.testing.assert_close(vanilla.total([*losses[:2], None]), losses[0] + losses[1])
    torch.testing.assert_close(vanilla[1](data(0)), vanilla(data(0))[1])


def test_that_heads_may_work_in_place() -> None:
    model = RotoGrad(
        backbone(), [nn.Sequential(nn.ReLU(inplace=True), nn.Linear(SIZE, 1))] * 2, SIZE
    )
    model.backward([one.square().mean() for one in model(data(0, dtype=torch.float32))])
    assert model.backbone.get_parameter("0.weight").grad is not None


def test_measures() -> None:
    model = build(RotoGrad, num_tasks=2)
    assert model.measures() == {}
    model.measure_before_rotation = True
    z = model.backbone(data(0)).detach().requires_grad_()
    rotated = [z @ matrix.T for matrix in model.rotations.matrices]
    losses = losses_of([h(r) for h, r in zip(model.heads, rotated, strict=True)], data(0))
    after = [torch.autograd.grad(loss, z, retain_graph=True)[0] for loss in losses]
    before = [torch.autograd.grad(loss, r)[0] for loss, r in zip(losses, rotated, strict=True)]
    model.backward(losses_of(model(data(0)), data(0)))
    measures = model.measures()

    def cosine(pair: list[Tensor]) -> Any:
        one, other = (tensor.flatten() for tensor in pair)
        return pytest.approx(torch.cosine_similarity(one, other, dim=0).item())

    assert measures["cosine/1_0"] == cosine(after)
    assert measures["cosine_before/1_0"] == cosine(before)
    assert measures["grad_norm/1"] == pytest.approx(after[1].norm().item())
    assert 0 < measures["orthogonality_error"] < 1e-6
    assert all(type(value) is float for value in measures.values())


def test_that_a_step_inside_cached_is_refused() -> None:
    model = build(RotoGrad)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    bystander = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    with rotograd.cached():
        model.backward(losses_of(model(data(0)), data(0)))
        bystander.step()
        weight = model.backbone[0].weight.clone()
        with pytest.raises(RuntimeError, match="behind the block"):
            optimizer.step()
    assert torch.equal(weight, model.backbone[0].weight)
    optimizer.step()
    assert model.completed_steps == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": []}, "heads is empty"),
        ({"size_rotation": SIZE + 1}, "only 6 features"),
        ({"size_rotation": 0}, "at least one"),
        ({"init": "zeros"}, "'zeros'"),
        ({"burn_in_period": -1}, "number of steps, got -1"),
        ({"alpha": [1.0, 2.0]}, "one finite number"),
        ({"alpha": float("nan")}, "one finite number"),
    ],
)
def test_bad_models(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RotoGradNorm(backbone(), **{"heads": heads(2), "size_z": SIZE, **options})


def test_that_both_shapes_are_named() -> None:
    model = RotoGrad(backbone(), heads(2), 7)
    with pytest.raises(ValueError, match=r"size_z is 7, but .* shape \(16, 6\)"):
        model(data(0, dtype=torch.float32))


def test_bad_losses() -> None:
    model = build(RotoGrad)
    losses = losses_of(model(data(0)), data(0))
    with pytest.raises(ValueError, match="each of 3 tasks, got 2"):
        model.backward(losses[:2])
    with pytest.raises(ValueError, match=r"losses\[1\] must be a scalar, got shape \(16, 1\)"):
        model.backward([losses[0], model(data(0))[1], losses[2]])
    with pytest.raises(ValueError, match="all losses are None"):
        model.backward([None] * 3)
    with pytest.raises(TypeError, match="got Linear"):
        rotograd.total(nn.Linear(1, 1), losses)


def test_that_eval_mode_trains_nothing() -> None:
    model = build(RotoGrad).eval()
    with torch.no_grad():
        model.total(losses_of(model(data(0)), data(0)))
    with pytest.raises(RuntimeError, match=r"model\.train\(\)"):
        model.backward(losses_of(model(data(0)), data(0)))


def test_that_an_optimizer_without_rotations_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("toolkit.rotograd.rotating._MOST_BACKWARDS", 3)
    model = build(RotoGrad)
    optimizer = torch.optim.SGD(model.param_groups(lr=1e-2, lr_rotation=1e-2))
    forgetful = torch.optim.SGD([*model.backbone.parameters(), *model.heads.parameters()], lr=1e-2)
    for one in [optimizer] * 4 + [forgetful] * 2:
        model.backward(losses_of(model(data(0)), data(0)))
        one.step()
    with pytest.warns(UserWarning, match=r"rotation_parameters\(\)"):
        model.backward(losses_of(model(data(0)), data(0)))
    assert model.completed_steps == 4


def test_that_losses_taken_one_by_one_are_refused() -> None:
    model = build(RotoGrad)
    losses = losses_of(model(data(0)), data(0))
    losses[0].backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="sum the losses"):
        losses[1].backward()


def test_losses_that_have_no_rate() -> None:
    model = build(RotoGradNorm, alpha=0.5)
    with pytest.raises(RuntimeError, match=r"model\.total"):
        torch.stack(losses_of(model(data(0)), data(0))).sum().backward()
    predictions = model(data(0))
    with pytest.raises(ValueError, match="first loss of task 1 is 0"):
        model.backward(
            [p.mean() - (p.mean().detach() if k == 1 else 0) for k, p in enumerate(predictions)]
        )
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
    model.backward(losses_of(model(data(0)), data(0)))
    optimizer.step()
    losses = losses_of(model(data(0)), data(0))
    with pytest.raises(ValueError, match=r"alpha=0\.5"):
        model.backward([losses[0], -0.1 * losses[1], losses[2]])
    plain = build(RotoGradNorm, alpha=0.0)
    torch.stack(losses_of(plain(data(0)), data(0))).sum().backward()
    assert plain.raw_weights.grad is not None
    zero = build(RotoGrad, normalize_losses=True)
    with pytest.raises(ValueError, match="cannot normalise"):
        zero.total([torch.zeros(()), None, torch.ones(())])


def test_that_an_accelerator_may_be_given() -> None:
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(build(RotoGrad))
    model.backward(losses_of(model(data(0)), data(0)), accelerator=accelerator)
    assert model.rotations.tangents.grad.any()


def test_that_a_penalty_of_the_backbone_is_added() -> None:
    model, twin = build(RotoGrad), build(RotoGrad)
    losses = losses_of(model(data(0)), data(0))
    with pytest.raises(TypeError, match="positional"):
        model.backward(losses, model.backbone[0].weight.square().sum())
    (model.total(losses) + model.backbone[0].weight.square().sum()).backward()
    twin.backward(losses_of(twin(data(0)), data(0)))
    expected = twin.backbone[0].weight.grad + 2 * twin.backbone[0].weight.detach()
    torch.testing.assert_close(model.backbone[0].weight.grad, expected)
