"""Injections of hand-written payloads of known ages into a sharded and a whole model.

See ``tests/distributed/test_staleness.py``, which computes what must come out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.jobs.several_donors_job import Network, build_optimizer
from toolkit import BridgeConfig
from toolkit.bridge.accumulation import Window
from toolkit.bridge.control import ControlGroup
from toolkit.bridge.injection import Injector
from toolkit.bridge.payload import Header, Record
from toolkit.parameters import shared_parameters
from toolkit.sharding import full_tensor, is_sharded, shard_like

RULES = ("apply", "damp", "compensate", "compensate_adaptive")
HEADS = ("heads.h2", "heads.h3")
DONOR_WEIGHT = {"heads.h2": 0.7, "heads.h3": 0.4}
COMPENSATION = 0.3
SCALE = 2.0**7  # of a loss scaler
OWN_COUNT = 6.0
# For each step, by donor: its head, the age of its payload and its samples.
STEPS: list[dict[str, tuple[str, int, float]]] = [
    {"first": ("heads.h2", 0, 4.0)},
    {"first": ("heads.h2", 1, 5.0), "third": ("heads.h3", 0, 3.0)},
    {"first": ("heads.h2", 0, 7.0), "second": ("heads.h2", 2, 2.0), "third": ("heads.h3", 1, 8.0)},
    {},
    {"second": ("heads.h2", 2, 9.0), "third": ("heads.h3", 2, 3.0)},
]


def gradient_sum(like: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Numbers of a few units, of the shapes of ``like``."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: 8 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        for name, tensor in like.items()
    }


def payload(like: Mapping[str, Tensor], step: int, donor: str) -> dict[str, Tensor]:
    """The sum that a donor sends for a step: of the backbone and its head."""
    head = STEPS[step][donor][0]
    mine = {n: t for n, t in like.items() if n.startswith(("backbone.", f"{head}."))}
    return gradient_sum(mine, 100 * step + len(donor))


def own_sum(like: Mapping[str, Tensor], step: int) -> dict[str, Tensor]:
    """The receiver's own: of the backbone and h1."""
    mine = {n: t for n, t in like.items() if n.startswith(("backbone.", "heads.h1."))}
    return gradient_sum(mine, 1000 + step)


def train(
    accelerator: Accelerator, rule: str, shards: bool
) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """The weights after all steps, whole, and the metrics of each."""
    settings: dict[str, Any] = {"stale": rule, "donor_weight": DONOR_WEIGHT, "max_staleness": 2}
    if rule.startswith("compensate"):
        settings["compensation"] = COMPENSATION
    network = Network(["h1", "h2", "h3"])
    if shards:
        mesh = init_device_mesh("cpu", (accelerator.num_processes,))
        for layer in (network.backbone[0], *network.heads.values()):  # the other one stays whole
            fully_shard(layer, mesh=mesh)
    parameters = dict(network.named_parameters())
    shared = shared_parameters(network, "backbone", HEADS)
    config = BridgeConfig(**settings)
    control = ControlGroup(accelerator)
    injector = Injector(accelerator, parameters.values(), shared, control, config)
    optimizer = build_optimizer(network)
    metrics = []
    for step, donors in enumerate(STEPS):
        optimizer.zero_grad()
        for name, tensor in own_sum(parameters, step).items():
            parameters[name].grad = shard_like(SCALE * tensor, parameters[name])
        records = [
            Record(
                header=Header(
                    kind="gradient", run_id="", job=donor, attempt=1, receiver_step=step - age,
                    weights_digest="", head=head, count=count,
                ),
                tensors=payload(parameters, step, donor),
                num_bytes=0,
            )
            for donor, (head, age, count) in donors.items()
        ]  # fmt: skip
        window = Window(count=OWN_COUNT, loss=0.0, sum_factor=1.0, scale=SCALE)
        metrics.append(injector.inject(window, records, step))
        for parameter in parameters.values():
            if parameter.grad is not None:
                parameter.grad.div_(SCALE)
        optimizer.step()
    assert any(map(is_sharded, parameters.values())) is shards
    control.close()
    return {n: full_tensor(p.detach()).clone() for n, p in parameters.items()}, metrics


def main() -> None:
    """Every rule, on a whole and on a sharded model."""
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    for rule in RULES:
        for shards in (False, True):
            weights, metrics = train(accelerator, rule, shards)
            stem = f"{rule}-{'sharded' if shards else 'whole'}-{accelerator.process_index}"
            save_file(weights, args.output / f"{stem}.safetensors")
            (args.output / f"{stem}.json").write_text(json.dumps(metrics))
    accelerator.wait_for_everyone()
    accelerator.free_memory()
    accelerator.end_training()


if __name__ == "__main__":
    main()
