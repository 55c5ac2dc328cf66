"""RotoGrad against a plain sum of losses, and against the package ``rotograd`` if it is there."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import multiprocessing
import os
import resource
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

from toolkit.benchmarks.timing import interleaved_medians, write_figures
from toolkit.rotograd import RotoGrad, VanillaMTL

NUM_TASKS, SIZES = (2, 8), (64, 256, 512)
NUM_CLASSES, HIDDEN_SIZE, NUM_INPUTS, SIDE = 10, 512, 256, 28
# Ratios of times that are to be kept, by K and d.
GOALS = {(2, 64): 1.1, (8, 64): 1.1, (2, 256): 1.6, (8, 256): 3.0, (2, 512): 4.0, (8, 512): 8.0}

Step = Callable[[], None]


def perceptron(size: int) -> tuple[nn.Module, tuple[int, ...]]:
    """Three linear layers, to ``size`` features; and the shape of a sample."""
    layers = (
        nn.Linear(NUM_INPUTS, HIDDEN_SIZE),
        nn.ReLU(),
        nn.Linear(HIDDEN_SIZE, HIDDEN_SIZE),
        nn.ReLU(),
        nn.Linear(HIDDEN_SIZE, size),
    )
    return nn.Sequential(*layers), (NUM_INPUTS,)


def convolutional(size: int) -> tuple[nn.Module, tuple[int, ...]]:
    """Two convolutions and a linear layer, to ``size`` features; and the shape of a sample."""
    layers = (
        nn.Conv2d(1, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * (SIDE // 4) ** 2, size),
    )
    return nn.Sequential(*layers), (1, SIDE, SIDE)


NETWORKS = {"mlp": perceptron, "cnn": convolutional}


@dataclasses.dataclass(frozen=True, slots=True)
class Setting:
    """One network with K tasks and d features."""

    network: str
    num_tasks: int
    size: int
    batch_size: int


def build_step(setting: Setting, method: str) -> Step:
    """A whole training step of ``sum``, ``rotograd`` (ours) or ``package``."""
    torch.manual_seed(0)
    backbone, shape = NETWORKS[setting.network](setting.size)
    heads = [nn.Linear(setting.size, NUM_CLASSES) for _ in range(setting.num_tasks)]
    inputs = torch.randn(setting.batch_size, *shape)
    labels = torch.randint(NUM_CLASSES, (setting.num_tasks, setting.batch_size))
    if method == "package":
        return package_step(backbone, heads, setting.size, inputs, labels)
    kinds = {"sum": VanillaMTL, "rotograd": RotoGrad}
    sizes = () if method == "sum" else (setting.size,)
    model = kinds[method](backbone, heads, *sizes)
    optimizer = torch.optim.Adam(model.param_groups(lr=1e-3, lr_rotation=5e-4))

    def step() -> None:
        sum(losses_of(model(inputs), labels)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def package_step(
    backbone: nn.Module, heads: Sequence[nn.Module], size: int, inputs: Tensor, labels: Tensor
) -> Step:
    """As the package's README has it."""
    import rotograd

    model = rotograd.RotoGrad(backbone, list(heads), size).train()
    optimizer = torch.optim.Adam([p for part in (backbone, *heads) for p in part.parameters()])
    rotations = torch.optim.Adam(model.parameters(), lr=5e-4)

    def step() -> None:
        with rotograd.cached():
            model.backward(losses_of(model(inputs), labels))
        for one in (optimizer, rotations):
            one.step()
            one.zero_grad()

    return step


def losses_of(predictions: Sequence[Tensor], labels: Tensor) -> list[Any]:
    """The mean cross-entropy of each task."""
    pairs = zip(predictions, labels, strict=True)
    return [functional.cross_entropy(prediction, label) for prediction, label in pairs]


def peak_memory(setting: Setting, method: str) -> float:
    """MiB by which a process grows at most while it builds a model and takes three steps."""
    context = multiprocessing.get_context("fork")  # which has all libraries in memory already
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_grow, args=(setting, method, theirs))
    child.start()
    theirs.close()
    try:
        grown: float = ours.recv()
    except EOFError:
        raise RuntimeError(f"the process that measures memory of {method} has failed") from None
    child.join()
    return grown


def _grow(setting: Setting, method: str, connection: Any) -> None:
    with open("/proc/self/statm") as statm:  # resident pages, of which ru_maxrss is the maximum
        before = int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1024
    step = build_step(setting, method)
    for _ in range(3):
        step()
    connection.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def measure_rotograd(args: argparse.Namespace) -> None:
    """Time and memory of a step for every network, number of tasks and size."""
    torch.set_num_threads(1)
    methods = ["sum", "rotograd"]
    if importlib.util.find_spec("rotograd") is not None:
        methods.append("package")
    settings = [
        Setting(network, num_tasks, size, args.batch_size)
        for network in args.networks
        for num_tasks in args.num_tasks
        for size in args.sizes
    ]
    console = Console()
    # Before anything runs backward in this process, after which it cannot be forked any more.
    with console.status("memory"):
        memory = [{name: peak_memory(setting, name) for name in methods} for setting in settings]
    rows = []
    for setting, mib in zip(settings, memory, strict=True):
        with console.status(f"{setting.network}, K={setting.num_tasks}, d={setting.size}"):
            steps = [build_step(setting, name) for name in methods]
            seconds = dict(zip(methods, interleaved_medians(steps, args.repeats), strict=True))
        row: dict[str, Any] = dataclasses.asdict(setting)
        row |= {"sum (ms)": 1000 * seconds["sum"], "sum (MiB)": mib["sum"]}
        for name in methods[1:]:
            row[f"{name} time ratio"] = seconds[name] / seconds["sum"]
            row[f"{name} memory ratio"] = mib[name] / mib["sum"]
        row["goal"] = GOALS.get((setting.num_tasks, setting.size))
        rows.append(row)
    report(rows, methods, args)


def report(rows: list[dict[str, Any]], methods: list[str], args: argparse.Namespace) -> None:
    """Print a table, then the same as one line of JSON; write that to ``--output`` if given."""
    table = Table(title="One step over a step of the plain sum of losses")
    names = {"rotograd": "RotoGrad", "package": "package"}
    headings = ["network", "K", "d", "sum (ms)"]
    headings += [f"{names[name]} {what}" for what in ("time", "memory") for name in methods[1:]]
    for heading in [*headings, "goal (time)"]:
        table.add_column(heading, justify="left" if heading == "network" else "right")
    for row in rows:
        cells = [row["network"], str(row["num_tasks"]), str(row["size"]), f"{row['sum (ms)']:.2f}"]
        for what in ("time", "memory"):
            cells += [f"x{row[f'{name} {what} ratio']:.2f}" for name in methods[1:]]
        table.add_row(*cells, f"x{row['goal']:.1f}" if row["goal"] else "-")
    Console().print(table)
    facts = {
        "benchmark": "rotograd",
        "repeats": args.repeats,
        "torch": torch.__version__,
        "package": importlib.metadata.version("rotograd") if "package" in methods else None,
    }
    write_figures({**facts, "rows": rows}, args.output)
