"""One forward for two losses of two models, against two forwards."""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from torch.optim import Optimizer, RMSprop

from toolkit.benchmarks.timing import Row, interleaved_medians, report
from toolkit.isolation import CutPoint, backward_for


class Pair:
    """A critic (model1), a generator (model2), their optimizers and one batch."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(0)
        size = args.hidden_size
        self.critic = nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, 1))
        self.generator = nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, size))
        models = (self.critic, self.generator)
        self.optimizers = [RMSprop(model.parameters(), lr=1e-4) for model in models]
        self.latents, self.real = torch.randn(2, args.batch_size, size)

    def finish(self, *optimizers: Optimizer) -> None:
        """Step, and clear the gradients of both models."""
        for optimizer in optimizers:
            optimizer.step()
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def weights(self) -> list[Tensor]:
        """Of both models."""
        return [*self.critic.parameters(), *self.generator.parameters()]


def two_forwards(pair: Pair) -> None:
    """loss1, step, loss2, step; the generator's output is computed for each."""
    critic, generator = pair.critic, pair.generator
    with torch.no_grad():
        fake = generator(pair.latents)
    (critic(fake).mean() - critic(pair.real).mean()).backward()
    pair.finish(pair.optimizers[0])
    (-critic(generator(pair.latents)).mean()).backward()
    pair.finish(pair.optimizers[1])


def one_forward(pair: Pair) -> None:
    """The same with a cut point."""
    critic, generator = pair.critic, pair.generator
    cut = CutPoint(generator(pair.latents), generator)
    backward_for(critic(cut.detached).mean() - critic(pair.real).mean(), critic)
    pair.finish(pair.optimizers[0])
    cut.backward(-critic(cut.attached).mean())
    pair.finish(pair.optimizers[1])


def two_forwards_together(pair: Pair) -> None:
    """Both losses at the same weights, then both steps; each loss with forwards of its own."""
    critic, generator = pair.critic, pair.generator
    with torch.no_grad():
        fake = generator(pair.latents)
    loss1 = critic(fake).mean() - critic(pair.real).mean()
    loss2 = -critic(generator(pair.latents)).mean()
    loss2.backward()
    pair.optimizers[0].zero_grad()  # what loss2 left in the critic
    loss1.backward()
    pair.finish(*pair.optimizers)


def one_forward_together(pair: Pair) -> None:
    """The same with one forward of the generator, and one of the critic on its output."""
    critic, generator = pair.critic, pair.generator
    cut = CutPoint(generator(pair.latents), generator)
    score = critic(cut.attached).mean()
    backward_for(score - critic(pair.real).mean(), critic, retain_graph=True)
    cut.backward(-score)
    pair.finish(*pair.optimizers)


def measure_isolation(args: argparse.Namespace) -> None:
    """Time the four loops, after showing that one forward trains as two do, bit by bit."""
    torch.set_num_threads(1)
    variants = {
        "in turn, two forwards": (two_forwards, ""),
        "in turn, cut point": (one_forward, "in turn, two forwards"),
        "together, two forwards": (two_forwards_together, ""),
        "together, cut point": (one_forward_together, "together, two forwards"),
    }
    pairs = {name: Pair(args) for name in variants}
    steps = [lambda f=step, name=name: f(pairs[name]) for name, (step, _) in variants.items()]
    medians = dict(zip(variants, interleaved_medians(steps, args.repeats), strict=True))
    for name, (_, against) in variants.items():
        if against:
            weights = zip(pairs[name].weights(), pairs[against].weights(), strict=True)
            assert all(torch.equal(one, other) for one, other in weights), f"{name}: other weights"
    rows = [
        Row(name, 1000 * medians[name], medians[name] / medians[against or name], against)
        for name, (_, against) in variants.items()
    ]
    facts = {
        "benchmark": "isolation",
        "batch_size": args.batch_size,
        "hidden_size": args.hidden_size,
        "repeats": args.repeats,
        "torch": torch.__version__,
    }
    report("One step of two models, same weights after it", rows, facts, args.output)
