"""A receiver with two heads of donors, and donors that come and go (test_several_donors.py)."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from tests.oracle import UnevenBatches
from toolkit import BridgeConfig, GradientDonor, GradientReceiver

NUM_FEATURES = 6
NUM_CLASSES = {"h1": 3, "h2": 4, "h3": 2}
HEAD_OF = {"receiver": "h1", "first": "h2", "second": "h2", "third": "h3"}
NUM_SAMPLES = {"receiver": 83, "first": 61, "second": 47, "third": 39}
SEED_OF = {job: seed for seed, job in enumerate(HEAD_OF, start=1)}
DONOR_WEIGHT = {"heads.h2": 0.7, "heads.h3": 0.4}
MIN_STEPS, MIN_APPLIED = 30, 8  # of the receiver, and of every donor's payloads
LEAVES = {"second": 12}  # windows after which a donor ends


class Network(nn.Module):
    """A small smooth network: backbone and heads."""

    def __init__(self, heads: list[str]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(
            nn.Linear(NUM_FEATURES, 8), nn.Tanh(), nn.Linear(8, 5), nn.Tanh()
        )
        modules = {head: nn.Linear(5, classes) for head, classes in NUM_CLASSES.items()}
        self.heads = nn.ModuleDict({head: modules[head] for head in heads})
        self.double()

    def forward(self, features: Tensor, head: str) -> Tensor:
        """Logits of one head."""
        logits: Tensor = self.heads[head](self.backbone(features))
        return logits


def build_dataset(job: str) -> TensorDataset:
    """The silo of one job."""
    generator = torch.Generator().manual_seed(SEED_OF[job])
    features = torch.randn(NUM_SAMPLES[job], NUM_FEATURES, generator=generator).double()
    classes = NUM_CLASSES[HEAD_OF[job]]
    return TensorDataset(features, torch.randint(classes, (len(features),), generator=generator))


def build_batches(job: str) -> UnevenBatches:
    """Its batches."""
    return UnevenBatches(NUM_SAMPLES[job], 10 + SEED_OF[job])


def build_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of every job and of joint training."""
    return torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.05)


def receive(accelerator: Accelerator, config: BridgeConfig, output: Path) -> None:
    """Train until every donor had its part."""
    network = Network(["h1", "h2", "h3"])
    for head in ("h2", "h3"):
        network.heads[head].requires_grad_(False)
    model, optimizer, dataloader = accelerator.prepare(
        network,
        build_optimizer(network),
        DataLoader(build_dataset("receiver"), batch_sampler=build_batches("receiver")),
    )
    with GradientReceiver(
        accelerator, model, optimizer, config, head=["heads.h2", "heads.h3"]
    ) as receiver:

        def is_done() -> bool:
            applied = {name: f["applied"] for name, f in receiver.fates_by_donor().items()}
            enough = {name for name, count in applied.items() if count >= MIN_APPLIED}
            has_steps = receiver.completed_steps >= MIN_STEPS
            return has_steps and enough == set(HEAD_OF) - {"receiver"}

        epoch = 0
        while True:
            dataloader.set_epoch(epoch)
            for features, labels in dataloader:
                with accelerator.accumulate(model):
                    loss = F.cross_entropy(model(features, "h1"), labels)
                    receiver.backward(loss, num_samples=len(labels))
                    receiver.inject()
                    optimizer.step()
                    optimizer.zero_grad()
                    receiver.commit()
                if receiver.control.on_main(is_done):
                    state = accelerator.unwrap_model(model).state_dict()
                    save_file(state, output / f"receiver-{accelerator.process_index}.safetensors")
                    if accelerator.is_main_process:
                        content = {"by_donor": receiver.fates_by_donor(), "all": receiver.fates()}
                        (output / "fates.json").write_text(json.dumps(content))
                    return
            epoch += 1


def donate(accelerator: Accelerator, config: BridgeConfig) -> None:
    """Follow the receiver until it has ended, or this donor leaves."""
    name = config.donor_name
    head = HEAD_OF[name]
    network = Network([head])
    model, optimizer, dataloader = accelerator.prepare(
        network,
        build_optimizer(network),
        DataLoader(build_dataset(name), batch_sampler=build_batches(name)),
    )
    with GradientDonor(accelerator, model, optimizer, config, head=f"heads.{head}") as donor:
        for features, labels in donor.follow(dataloader, LEAVES.get(name)):
            with accelerator.accumulate(model):
                loss = F.cross_entropy(model(features, head), labels)
                donor.backward(loss, num_samples=len(labels))
                if not donor.publish():
                    raise AssertionError("the donor went alone")
                optimizer.zero_grad()


def main() -> None:
    """One job."""
    parser = argparse.ArgumentParser()
    parser.add_argument("job", choices=list(HEAD_OF))
    parser.add_argument("output", type=Path)
    parser.add_argument("settings", type=json.loads, help="of the bridge, as JSON")
    parser.add_argument("--expect_processes", type=int, required=True)
    args = parser.parse_args()
    accelerator = Accelerator(
        cpu=True, dataloader_config=DataLoaderConfiguration(even_batches=False)
    )
    assert accelerator.num_processes == args.expect_processes
    settings: dict[str, Any] = {"runs_dir": args.output / "runs", "donor_weight": DONOR_WEIGHT}
    config = BridgeConfig(**settings, **args.settings)
    if args.job == "receiver":
        receive(accelerator, config, args.output)
    else:
        donate(accelerator, dataclasses.replace(config, donor_name=args.job))
    accelerator.wait_for_everyone()
    accelerator.free_memory()
    accelerator.end_training()


if __name__ == "__main__":
    main()
