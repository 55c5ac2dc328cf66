"""Freezing on two ranks, case after case: what moved, and how the ranks compare.

Launched with ``accelerate launch``, it writes one JSON file per rank: by case, what
:class:`Outcome` says. Every case trains next to a model of which neither the optimizer nor
DistributedDataParallel has ever known the resting layer's parameters.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.distributed.tensor import DTensor

from tests.frozen_cases import (
    REST,
    differences,
    snapshot,
)
from tests.jobs.freezing_refusals import REFUSALS
from tests.jobs.freezing_training import (
    CASES,
    NAIVE_CASES,
    Case,
    Trainee,
    build,
    local,
    train,
    warmed_up,
)
from toolkit.freezing import frozen


@dataclasses.dataclass(kw_only=True)
class Outcome:
    """What a case did.

    Attributes:
        resting: names of what moved of the layer that should rest.
        others: names of what is not as without the layer.
        changed: names of the parameters that moved.
        num_ranks: of the process group.
        ranks_equal: whether all is bit by bit the same on all ranks.
    """

    resting: list[str]
    others: list[str]
    changed: list[str]
    num_ranks: int
    ranks_equal: bool


def without_the_layer(trained: Trainee, case: Case) -> dict[str, Any]:
    """What the same training makes of the others where the layer never had gradients."""
    values = {
        name: value.full_tensor() if isinstance(value, DTensor) else value
        for name, value in trained.net.state_dict().items()
    }
    trainee = build(case, values, knows_the_layer=False)
    for name, parameter in trained.net.named_parameters():
        if not name.startswith(REST) and parameter in trained.optimizer.state:
            state = copy.deepcopy(trained.optimizer.state[parameter])
            trainee.optimizer.state[trainee.net.get_parameter(name)] = state
    train(trainee, dataclasses.replace(case, naively=""))
    return local(snapshot(trainee.net, trainee.optimizer))


def run(case: Case) -> Outcome:
    """Freeze and train; what came of it."""
    trainee = warmed_up(case)
    net, optimizer = trainee.net, trainee.optimizer
    before = local(snapshot(net, optimizer))
    expected = without_the_layer(trainee, case)
    if trainee.accelerator is not None and dist.get_rank() == 0:
        net.get_parameter(f"{REST}.0.weight").register_hook(lambda gradient: gradient * torch.inf)
    if case.naively:
        net.get_submodule(REST).requires_grad_(case.naively != "requires-grad")
        train(trainee, case)
    else:
        with frozen(trainee.model, REST, optimizer=optimizer, requires_grad=case.requires_grad):
            train(trainee, case)
    after = local(snapshot(net, optimizer))

    def part(kept: dict[str, Any], rests: bool) -> dict[str, Any]:
        return {name: value for name, value in kept.items() if (REST in name) == rests}

    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, {} if case.mode == "fsdp2" else after)
    changed = [name.partition(" ")[2] for name in differences(before, after) if "parameter" in name]
    return Outcome(
        resting=differences(part(before, True), part(after, True)),
        others=differences(part(expected, False), part(after, False)),
        changed=changed,
        num_ranks=len(everyone),
        ranks_equal=all(differences(everyone[0], one) == [] for one in everyone),
    )


def main() -> None:
    """Run every case and write ``<output>/<rank>.json``."""
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    accelerator = Accelerator(cpu=True)
    every_case = {**CASES, **NAIVE_CASES}
    outcomes = {name: dataclasses.asdict(run(case)) for name, case in every_case.items()}
    refusals = {name: refuse() for name, refuse in REFUSALS.items()}
    path = args.output / f"{accelerator.process_index}.json"
    path.write_text(json.dumps({"outcomes": outcomes, "refusals": refusals}), encoding="utf-8")
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main()
