"""One job of a bridge, donor or receiver, over a list of runs: a setting each, perhaps mutated.

Launched with ``accelerate launch``; one launch trains every run, each in a directory of its own,
and writes every rank's final weights and the receiver's steps.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedDataParallelKwargs
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F
from torch.utils.data import DataLoader

from tests.jobs import sharding
from tests.matrix.joint import with_average
from tests.matrix.mutations import MUTATIONS, clip_before
from tests.matrix.overflow import loss_factor
from tests.matrix.setting import (
    EMA_DECAY,
    FROZEN,
    GROWTH_INTERVAL,
    HEAD,
    INIT_SCALE,
    MAX_GRAD_NORM,
    NO_LABEL,
    BatchSampler,
    Setting,
    Side,
    Silo,
    build_network,
    build_optimizer,
    from_json,
    learning_rate_factor,
)
from toolkit import BridgeConfig, GradientDonor, GradientReceiver
from toolkit.bridge.config import Role
from toolkit.parameters import plain_name


def build_accelerator(side: Side) -> Accelerator:
    """A fresh one, in the process group that there is."""
    AcceleratorState._reset_state(reset_partial_state=False)
    GradientState._reset_state()
    accelerator = Accelerator(
        cpu=True,
        mixed_precision=side.precision,
        gradient_accumulation_steps=side.accumulation,
        dataloader_config=DataLoaderConfiguration(even_batches=side.batches == "padded"),
        kwargs_handlers=[
            DistributedDataParallelKwargs(
                static_graph=side.wrapper == "static_graph",
                gradient_as_bucket_view=side.wrapper == "bucket_view",
            )
        ],
    )
    assert accelerator.num_processes == side.ranks
    if side.precision == "fp16":  # on a CPU Accelerate would leave both out without a word
        accelerator.native_amp = True
        accelerator.scaler = torch.amp.GradScaler(
            "cpu", init_scale=INIT_SCALE, growth_interval=GROWTH_INTERVAL
        )
    return accelerator


class Job:
    """What Accelerate makes of a setting in one role."""

    def __init__(self, accelerator: Accelerator, setting: Setting, role: Role) -> None:
        self.accelerator, self.setting, self.role = accelerator, setting, role
        self.side = side = setting.side(role)
        model: nn.Module = self._network()
        optimizer = build_optimizer(setting, model)
        silo = Silo(setting, role)
        loader = DataLoader(
            silo, batch_sampler=BatchSampler(setting, role), collate_fn=silo.collate
        )
        if side.wrapper == "none":
            self.model = model
            self.optimizer, self.dataloader = accelerator.prepare(optimizer, loader)
        else:
            self.model, self.optimizer, self.dataloader = accelerator.prepare(
                model, optimizer, loader
            )
        assert isinstance(self.model, FSDPModule) == (side.wrapper == "fsdp2")
        self.final: dict[str, Tensor] = {}
        self.base_lr = self.optimizer.param_groups[0]["lr"]

    def _network(self) -> nn.Module:
        setting, side = self.setting, self.side
        network = build_network(setting)
        if self.role == "receiver":
            network.heads["h2"].requires_grad_(False)
        else:
            del network.heads["h1"]
        if setting.frozen in (self.role, "both"):
            network.get_parameter(FROZEN).requires_grad_(False)
        network.backbone.is_checkpointed = side.forward == "checkpointed"
        if side.forward in ("compiled", "inductor"):  # the first: captured, but not generated
            backend = "eager" if side.forward == "compiled" else "inductor"
            compiled: Any = torch.compile(network.backbone, backend=backend, dynamic=True)
            network.backbone = compiled
        return network

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, float]:
        """The loss of a micro-batch as a user would write it, and its count."""
        reduction, unit = self.setting.loss_reduction, self.setting.unit
        logits = self.model(batch["features"], batch["keys"], HEAD[self.role]).flatten(0, 1)
        logits = logits.to(getattr(torch, self.setting.dtype))  # FSDP2 gives half precision
        labels = batch["labels"].flatten()
        if unit == "weights":
            losses = F.cross_entropy(logits, labels, reduction="none") * batch["weights"]
            count = float(batch["weights"].sum())
            loss = losses.sum() / count if reduction == "mean" and count else losses.sum()
        else:
            count = float((labels != NO_LABEL).sum())
            loss = F.cross_entropy(
                logits, labels, reduction=reduction if count else "sum", ignore_index=NO_LABEL
            )
        return loss, count

    def loss_factor(self, window: int) -> float:
        """What the loss is multiplied by; an overflow is on the last rank only."""
        is_last = self.accelerator.is_last_process
        return loss_factor(self.setting, self.role, window) if is_last else 1.0


def receive(job: Job, config: BridgeConfig, mutation: str) -> dict[str, Any]:
    """Train the receiver; what its steps were."""
    setting, accelerator, model, optimizer = job.setting, job.accelerator, job.model, job.optimizer
    network = accelerator.unwrap_model(model)
    average = {name: p.detach().clone() for name, p in network.named_parameters()}
    own_windows: list[int] = []
    clips = setting.clip and not (mutation and MUTATIONS[mutation].replacement is clip_before)
    with GradientReceiver(accelerator, model, optimizer, config) as receiver:
        while receiver.completed_steps < setting.num_steps:
            for batch in job.dataloader:
                with accelerator.accumulate(model):
                    loss, count = job.loss(batch)
                    factor = job.loss_factor(receiver.completed_windows)
                    receiver.backward(loss * factor, num_samples=count)
                    receiver.inject()
                    if accelerator.sync_gradients and clips:
                        accelerator.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
                    lr = job.base_lr * learning_rate_factor(setting, receiver.completed_steps)
                    optimizer.param_groups[0]["lr"] = lr
                    optimizer.step()
                    optimizer.zero_grad()
                    if receiver.commit():
                        own_windows.append(receiver.completed_windows - 1)
                        for name, p in network.named_parameters():
                            average[name].mul_(EMA_DECAY).add_(p.detach(), alpha=1 - EMA_DECAY)
                if receiver.completed_steps == setting.num_steps:
                    break
        job.final = with_average(network, average if setting.ema else {})
        return {"own_windows": own_windows, "fates": receiver.fates(), "run": str(receiver.run_dir)}


def donate(job: Job, config: BridgeConfig) -> None:
    """Follow the receiver until it has ended."""
    accelerator, model = job.accelerator, job.model
    with GradientDonor(accelerator, model, job.optimizer, config) as donor:
        for batch in donor.follow(job.dataloader):
            with accelerator.accumulate(model):
                loss, count = job.loss(batch)
                factor = job.loss_factor(donor.completed_windows)
                donor.backward(loss * factor, num_samples=count)
                if not donor.publish():
                    raise AssertionError("the donor went alone")
                job.optimizer.zero_grad()


def run(setting: Setting, role: Role, mutation: str, directory: Path) -> None:
    """One run in one role."""
    side = setting.side(role)
    accelerator = build_accelerator(side)
    config = BridgeConfig(
        runs_dir=directory / "runs",
        scope=setting.scope,
        rescale=setting.rescale,
        donor_weight=setting.donor_weight,
        loss_reduction=setting.loss_reduction,
        unit=setting.unit,
        frozen="rest" if setting.frozen in ("no", "both") else "cross",  # in one of the jobs
        require_peer=True,
    )
    with contextlib.ExitStack() as stack:
        if mutation and MUTATIONS[mutation].role == role:
            mutated = MUTATIONS[mutation]
            stack.enter_context(
                mock.patch.object(mutated.owner, mutated.method, mutated.replacement)
            )
        if side.wrapper == "fsdp2":
            # A tied tensor cannot be in two units, nor stays one where only rank 0 loads it.
            is_tied = setting.tied != "no"
            settings = sharding.WHOLE if is_tied else sharding.SETTINGS[role]
            stack.enter_context(sharding.fsdp2(accelerator, **settings))
        job = Job(accelerator, setting, role)
        if role == "donor":
            donate(job, config)
        else:
            steps = receive(job, config, mutation)
            final = {plain_name(name): tensor for name, tensor in job.final.items()}
            final = sharding.full_tensors(final)
            save_file(final, directory / f"receiver-{accelerator.process_index}.safetensors")
            if accelerator.is_main_process:
                (directory / "steps.json").write_text(json.dumps(steps))
    accelerator.wait_for_everyone()
    accelerator.free_memory()


def main() -> None:
    """Every run of the list, in one role."""
    parser = argparse.ArgumentParser()
    parser.add_argument("role", choices=["donor", "receiver"])
    parser.add_argument("runs", type=Path, help="JSON list of directory, setting and mutation")
    args = parser.parse_args()
    listing = json.loads(args.runs.read_text())
    for item in listing:
        directory = args.runs.parent / item["directory"]
        directory.mkdir(exist_ok=True)
        run(from_json(item["setting"]), args.role, item["mutation"], directory)
        gc.freeze()  # what is left is the library's: a second a run goes into looking through it
    Accelerator(cpu=True).end_training()


if __name__ == "__main__":
    main()
