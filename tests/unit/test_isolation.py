"""One forward for two losses: gradients for one model only, the cut point."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from toolkit.isolation import CutPoint, backward_for

pytestmark = pytest.mark.usefixtures("fresh_state")

Models = tuple[nn.Sequential, nn.Sequential]
DTYPE = torch.float64


@pytest.fixture
def models() -> Models:
    """model1 (a critic) and model2 (a generator)."""
    return build()


def build(seed: int = 0) -> Models:
    torch.manual_seed(seed)
    model1 = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1))
    model2 = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 5))
    return model1.to(DTYPE), model2.to(DTYPE)


def rmsprops(models: Models) -> list[torch.optim.Optimizer]:
    return [torch.optim.RMSprop(model.parameters(), lr=1e-2) for model in models]


def data(step: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    latents = torch.randn(4, 3, generator=generator, dtype=DTYPE)
    return latents, torch.randn(4, 5, generator=generator, dtype=DTYPE)


def grads(module: nn.Module) -> list[Tensor | None]:
    return [parameter.grad for parameter in module.parameters()]


def same(first: nn.Module, second: nn.Module) -> bool:
    """Whether all weights are bitwise equal."""
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


@contextlib.contextmanager
def forwards(module: nn.Module) -> Iterator[list[None]]:
    """Counts the forwards of a module, as the length of a list."""
    calls: list[None] = []
    handle = module.register_forward_hook(lambda *_: calls.append(None))
    yield calls
    handle.remove()


def two_forward_steps(models: Models, num_steps: int) -> None:
    """The plain loop: the output of model2 is computed for each loss."""
    model1, model2 = models
    optimizer1, optimizer2 = rmsprops(models)
    for step in range(num_steps):
        latents, real = data(step)
        optimizer1.zero_grad()
        (model1(model2(latents).detach()).mean() - model1(real).mean()).backward()
        optimizer1.step()
        optimizer2.zero_grad()
        (-model1(model2(latents)).mean()).backward()
        optimizer2.step()


def cut_steps(models: Models, num_steps: int) -> None:
    """The same with one forward of model2."""
    model1, model2 = models
    optimizer1, optimizer2 = rmsprops(models)
    for step in range(num_steps):
        latents, real = data(step)
        cut = CutPoint(model2(latents), model2)
        backward_for(model1(cut.detached).mean() - model1(real).mean(), model1)
        optimizer1.step()
        optimizer1.zero_grad()
        cut.backward(-model1(cut.attached).mean())
        optimizer2.step()
        optimizer2.zero_grad()


def test_that_steps_equal_those_of_the_two_forward_loop() -> None:
    plain, isolated = build(), build()
    with forwards(plain[1]) as calls:
        two_forward_steps(plain, 20)
    assert len(calls) == 40
    with forwards(isolated[1]) as calls:
        cut_steps(isolated, 20)
    assert len(calls) == 20
    assert all(same(one, other) for one, other in zip(plain, isolated, strict=True))
    assert not any(same(one, other) for one, other in zip(plain, build(), strict=True))


def test_that_one_forward_of_both_models_serves_both_losses() -> None:
    (model1, model2), (latents, real) = build(), data()
    loss1 = model1(model2(latents).detach()).mean() - model1(real).mean()
    expected1 = torch.autograd.grad(loss1, list(model1.parameters()))
    expected2 = torch.autograd.grad(-model1(model2(latents)).mean(), list(model2.parameters()))

    with forwards(model1) as calls1, forwards(model2) as calls2:
        cut = CutPoint(model2(latents), model2)
        score = model1(cut.attached).mean()
        backward_for(score - model1(real).mean(), model1, retain_graph=True)
        assert grads(model2) == [None] * 4
        cut.backward(-score)
    assert (len(calls1), len(calls2)) == (2, 1)  # model1: once more for the real ones
    torch.testing.assert_close(grads(model1), list(expected1), rtol=0, atol=0)
    torch.testing.assert_close(grads(model2), list(expected2), rtol=0, atol=0)


def test_that_gradients_add_up_in_one_model_and_nowhere_else(models: Models) -> None:
    model1, model2 = models
    latents, _ = data()
    for model in models:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
    backward_for(model1(model2(latents)).sum(), model2)
    single = torch.autograd.grad(model1(model2(latents)).sum(), list(model2.parameters()))
    torch.testing.assert_close(grads(model2), [1 + grad for grad in single], rtol=0, atol=0)
    assert all(bool((grad == 1).all()) for grad in grads(model1) if grad is not None)


def test_that_a_module_before_the_cut_gets_nothing(models: Models) -> None:
    model1, model2 = models
    encoder = nn.Linear(3, 3, dtype=DTYPE)
    cut = CutPoint(model2(encoder(data()[0])), model2)
    regular = sum(parameter.square().sum() for parameter in model2.parameters())
    cut.backward(model1(cut.attached).sum() + regular)  # a term that bypasses the cut counts too
    assert grads(encoder) == [None, None]
    expected = torch.autograd.grad(
        model1(model2(encoder(data()[0]))).sum()
        + sum(parameter.square().sum() for parameter in model2.parameters()),
        list(model2.parameters()),
    )
    torch.testing.assert_close(grads(model2), list(expected), rtol=0, atol=0)


def test_activation_checkpoints(models: Models) -> None:
    model1, model2 = models
    latents, _ = data()
    expected = torch.autograd.grad(model1(model2(latents)).sum(), list(model2.parameters()))
    output = checkpoint(model2, latents, use_reentrant=False)
    backward_for(model1(output).sum(), model2)
    torch.testing.assert_close(grads(model2), list(expected), rtol=0, atol=0)

    # Half of the model hidden: torch itself would leave that half without a gradient in silence.
    half = checkpoint(model2[:2], latents.requires_grad_(), use_reentrant=True)
    with pytest.raises(ValueError, match=r"hides parameters of Sequential.*use_reentrant=False"):
        backward_for(model1(model2[2](half)).sum(), model2)


def after_step_of_model1(models: Models) -> None:
    model1, model2 = models
    optimizer1, _ = rmsprops(models)
    cut = CutPoint(model2(data()[0]), model2)
    loss2 = model1(cut.attached).mean()
    backward_for(model1(cut.detached).mean(), model1)
    optimizer1.step()
    cut.backward(loss2)


def after_step_of_model2(models: Models) -> None:
    model1, model2 = models
    _, optimizer2 = rmsprops(models)
    cut = CutPoint(model2(data()[0]), model2)
    backward_for(model1(cut.attached).mean(), model2)
    optimizer2.step()
    model1(cut.detached)


def backward_twice(models: Models) -> None:
    model1, model2 = models
    cut = CutPoint(model2(data()[0]), model2)
    loss = model1(cut.attached)
    cut.backward(loss.mean())
    cut.backward(loss.sum())


def output_in_place(models: Models) -> None:
    model1, model2 = models
    cut = CutPoint(model2(data()[0]), model2)
    cut.detached.clamp_(-0.1, 0.1)
    model1(cut.attached)


@pytest.mark.parametrize(
    ("misuse", "message"),
    [
        (after_step_of_model1, "gradient for Sequential depends on .* changed after the forward"),
        (after_step_of_model2, "changed after the forward whose output this is .*: 0.weight, 0.b"),
        (backward_twice, "has had its backward: sum the losses"),
        (output_in_place, "modified in place after the cut, for both losses: clone it"),
    ],
)
def test_that_a_wrong_order_is_refused(
    models: Models, misuse: Callable[[Models], None], message: str
) -> None:
    with pytest.raises(RuntimeError, match=message):
        misuse(models)


def test_bad_input(models: Models) -> None:
    model1, model2 = models
    latents, real = data()
    with pytest.raises(ValueError, match=r"scalar, got shape \(4, 1\); take a mean or sum"):
        backward_for(model1(real), model1)
    with torch.no_grad(), pytest.raises(ValueError, match=r"no graph, so Sequential gets no"):
        backward_for(model1(real).sum(), model1)
    with pytest.raises(ValueError, match="does not depend on any parameter of Sequential"):
        backward_for(model1(real).sum(), model2)
    cut = CutPoint(model2(latents), model2)
    with pytest.raises(ValueError, match="did its forward run on a detached"):
        cut.backward(model1(cut.detached).sum())
    with pytest.raises(ValueError, match="output has no graph: give CutPoint what the model"):
        CutPoint(model2(latents).detach(), model2)
    with pytest.raises(ValueError, match="no parameter that requires a gradient: is it frozen"):
        backward_for(model1(real).sum(), model2.requires_grad_(False))


@pytest.mark.usefixtures("one_rank")
def test_wrappers_that_are_refused(models: Models) -> None:
    model1, _ = models
    accelerator = Accelerator(cpu=True)
    wrapped = DistributedDataParallel(model1)
    accelerator._models.append(wrapped)
    with pytest.raises(ValueError, match="Linear is only a part of a model that Distributed"):
        backward_for(wrapped(data()[1]).sum(), model1[0], accelerator)
    backward_for(wrapped(data()[1]).sum(), model1, accelerator)
    sharded = nn.Linear(3, 2)
    fully_shard(sharded, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(ValueError, match="sharded by FSDP are not supported"):
        backward_for(sharded(torch.ones(1, 3)).sum(), sharded)
