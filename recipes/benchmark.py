"""Measure what the parts of this toolkit cost and save.

    python recipes/benchmark.py isolation

All variants run side by side in one process and on one thread, interleaved, so that a busy machine
slows them alike; what counts is the ratio of their medians.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.optim import Optimizer, RMSprop

from toolkit.flag_types import DefaultsFormatter, positive_int
from toolkit.isolation import CutPoint, backward_for


def parse_arguments() -> argparse.Namespace:
    """Parse the command line; ``measure`` is the subcommand's function."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--repeats", type=positive_int, default=200, help="steps of each variant")
    common.add_argument("--output", type=Path, help="write the figures here too, as JSON")
    parser = argparse.ArgumentParser(description="Measure what parts of this toolkit cost or save.")
    commands = parser.add_subparsers(required=True, metavar="WHAT")
    isolation = commands.add_parser(
        "isolation",
        parents=[common],
        help="one forward for two losses, against two",
        description="A step of two models, one feeding the other, each with a loss of its own.",
        formatter_class=DefaultsFormatter,
    )
    isolation.add_argument("--batch_size", type=positive_int, default=256, help="samples")
    isolation.add_argument("--hidden_size", type=positive_int, default=512, help="of both models")
    isolation.set_defaults(measure=measure_isolation)
    return parser.parse_args()


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One variant's figures.

    Attributes:
        variant: what was measured.
        median_ms: of one step, in milliseconds.
        ratio: to the variant that it is compared with, of the medians.
        against: the name of that variant; empty for a baseline.
    """

    variant: str
    median_ms: float
    ratio: float
    against: str


def interleaved_medians(steps: Sequence[Callable[[], None]], repeats: int) -> list[float]:
    """Median time (s) of each step, all of them run in turn, after some rounds to warm up."""
    seconds: list[list[float]] = [[] for _ in steps]
    for repeat in range(-max(3, repeats // 10), repeats):
        for step, found in zip(steps, seconds, strict=True):
            start = time.perf_counter()
            step()
            if repeat >= 0:
                found.append(time.perf_counter() - start)
    return [statistics.median(found) for found in seconds]


def report(title: str, rows: Sequence[Row], facts: dict[str, Any], output: Path | None) -> None:
    """Print the table, then the same as one line of JSON; write that to ``output`` if given."""
    table = Table(title=title)
    for heading in ("variant", "median (ms)", "ratio", "against"):
        table.add_column(
            heading, justify="right" if heading in ("median (ms)", "ratio") else "left"
        )
    for row in rows:
        table.add_row(row.variant, f"{row.median_ms:.3f}", f"{row.ratio:.3f}", row.against or "-")
    Console().print(table)
    text = json.dumps({**facts, "rows": [dataclasses.asdict(row) for row in rows]})
    print(text)
    if output is not None:
        output.write_text(text + "\n", encoding="utf-8")


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


def main() -> None:
    """Measure what the subcommand says."""
    args = parse_arguments()
    args.measure(args)


if __name__ == "__main__":
    main()
