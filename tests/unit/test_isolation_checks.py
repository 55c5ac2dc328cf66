"""Every way in which one of two models moves the other, caught by name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import RMSprop

from toolkit.isolation import CutPoint, LeakError, backward_for, check_disjoint, no_leak

pytestmark = pytest.mark.usefixtures("fresh_state")


class Generator(nn.Module):
    """model2: its output is the critic's input."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, latents: Tensor) -> Tensor:
        output: Tensor = self.norm(self.layer(latents))
        return output


class Pair:
    """Both models, their optimizers with some history, and one batch."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.generator, self.critic = Generator(), nn.Linear(4, 1)
        self.generator_optimizer = RMSprop(self.generator.parameters(), lr=0.1)
        self.critic_optimizer = RMSprop(self.critic.parameters(), lr=0.1)
        self.shared_optimizer = RMSprop([*self.critic.parameters(), *self.generator.parameters()])
        self.latents = torch.randn(5, 3)
        self.fake: Tensor = self.generator(self.latents)
        self.loss1().backward()
        for optimizer in (self.generator_optimizer, self.critic_optimizer, self.shared_optimizer):
            optimizer.step()
        self.shared_optimizer.zero_grad()
        self.fake = self.generator(self.latents)

    def loss1(self) -> Tensor:
        """Of the critic, the detach forgotten."""
        loss: Tensor = self.critic(self.fake).square().mean()
        return loss


@pytest.fixture
def pair() -> Pair:
    return Pair()


def forgotten_detach(pair: Pair) -> None:
    pair.loss1().backward()
    pair.critic_optimizer.step()


def shared_optimizer(pair: Pair) -> None:
    # Nothing reached the generator in this step, and yet its zero gradients step it.
    for parameter in pair.generator.parameters():
        parameter.grad = torch.zeros_like(parameter)
    backward_for(pair.loss1(), pair.critic)
    pair.shared_optimizer.step()
    pair.shared_optimizer.zero_grad()


def step_of_the_other(pair: Pair) -> None:
    pair.loss1().backward()
    pair.generator_optimizer.step()
    pair.generator_optimizer.zero_grad()


def forward_twice(pair: Pair) -> None:
    backward_for(pair.critic(pair.generator(pair.latents).detach()).mean(), pair.critic)


def state_lost(pair: Pair) -> None:
    del pair.generator_optimizer.state[pair.generator.layer.weight]["square_avg"]


def negative_zero(pair: Pair) -> None:
    with torch.no_grad():
        pair.generator.norm.bias.zero_().neg_()


def clear_and_fail(pair: Pair) -> None:
    pair.generator_optimizer.zero_grad()
    forgotten_detach(pair)  # raises where the graph is gone


@pytest.mark.parametrize(
    ("danger", "optimizer", "names"),
    [
        (forgotten_detach, None, ["the gradient of layer.weight appeared", "of norm.bias app"]),
        (shared_optimizer, "shared", ["the optimizer's square_avg of layer.weight changed"]),
        (step_of_the_other, None, ["the value of layer.weight changed", "value of norm.bias ch"]),
        (step_of_the_other, "generator", ["the optimizer's square_avg of layer.weight changed"]),
        (step_of_the_other, "generator", ["the optimizer's step of layer.bias changed"]),
        (forward_twice, None, ["buffer norm.running_mean", "buffer norm.num_batches_tracked ch"]),
        (state_lost, "generator", ["the optimizer's square_avg of layer.weight vanished"]),
        (negative_zero, None, ["the value of norm.bias changed"]),
    ],
)
def test_that_a_leak_is_caught_by_name(
    pair: Pair, danger: Callable[[Pair], None], optimizer: str | None, names: list[str]
) -> None:
    own = None if optimizer is None else getattr(pair, f"{optimizer}_optimizer")
    message = "Generator was to rest, but "
    with pytest.raises(LeakError, match=message) as caught, no_leak(pair.generator, own):
        danger(pair)
    for name in names:
        assert name in str(caught.value)


def test_that_an_accumulated_gradient_must_stay(pair: Pair) -> None:
    backward_for(pair.loss1(), pair.generator)
    pair.fake = pair.generator(pair.latents)
    caught = pytest.raises(LeakError, match=r"the gradient of layer\.weight changed")
    with caught, no_leak(pair.generator):
        pair.loss1().backward()
    caught = pytest.raises(LeakError, match=r"the gradient of layer\.weight vanished")
    with caught, no_leak(pair.generator):
        pair.generator_optimizer.zero_grad()


def test_that_an_isolated_step_leaks_nothing(pair: Pair) -> None:
    cut = CutPoint(pair.fake, pair.generator)
    with no_leak(pair.generator, pair.generator_optimizer):
        backward_for(pair.critic(cut.detached).mean(), pair.critic)
        pair.critic_optimizer.step()
        pair.critic_optimizer.zero_grad()
    before = pair.generator.layer.weight.clone()
    with no_leak(pair.critic, pair.critic_optimizer):
        cut.backward(pair.critic(cut.attached).square().mean())
        pair.generator_optimizer.step()
    assert not torch.equal(pair.generator.layer.weight, before)


def test_that_a_leak_check_hides_no_other_error_and_can_be_off(pair: Pair) -> None:
    with no_leak(pair.generator, enabled=False):
        forgotten_detach(pair)
    with pytest.raises(RuntimeError, match="second time"), no_leak(pair.generator):
        clear_and_fail(pair)


def test_that_wrapped_models_and_optimizers_are_checked(pair: Pair) -> None:
    accelerator = Accelerator(cpu=True)
    generator = accelerator.prepare(torch.compile(pair.generator, backend="eager"))
    optimizer = accelerator.prepare(pair.generator_optimizer)
    caught = pytest.raises(LeakError, match=r"the optimizer's square_avg of layer\.weight changed")
    with caught, no_leak(generator, optimizer):
        step_of_the_other(pair)
    check_disjoint(critic=(pair.critic, pair.critic_optimizer), generator=(generator, optimizer))


def test_that_optimizers_of_the_same_parameters_are_refused(pair: Pair) -> None:
    good = (pair.generator, pair.generator_optimizer)
    check_disjoint(critic=(pair.critic, pair.critic_optimizer), generator=good)
    with pytest.raises(
        ValueError,
        match=r"critic and generator: generator\.layer\.bias, generator\.layer\.weight, .*norm",
    ):
        check_disjoint(critic=(pair.critic, pair.shared_optimizer), generator=good)
    both = pair.shared_optimizer
    with pytest.raises(ValueError, match=r"critic and generator: critic\.bias, critic\.weight, g"):
        check_disjoint(critic=(pair.critic, both), generator=(pair.generator, both))
    with pytest.raises(ValueError, match="optimizer given for critic does not hold any"):
        check_disjoint(critic=(pair.critic, pair.generator_optimizer), generator=good)
    refused = pytest.raises(ValueError, match="optimizer given for Linear does not hold any")
    with refused, no_leak(pair.critic, pair.generator_optimizer):
        pass


def test_that_tied_weights_are_refused(pair: Pair) -> None:
    tied = nn.Linear(3, 4)
    tied.weight = pair.generator.layer.weight
    optimizer = RMSprop([tied.bias])  # the optimizers have nothing in common
    with pytest.raises(ValueError, match=r"generator and encoder: \w+\.(layer\.)?weight\. Each"):
        check_disjoint(
            generator=(pair.generator, pair.generator_optimizer), encoder=(tied, optimizer)
        )
