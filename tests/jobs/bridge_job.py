"""One job of a bridge, donor or receiver, over a list of cases (see ``tests/oracle.py``).

Launched with ``accelerate launch``; one launch trains every case, each in a runs directory of its
own, and writes every rank's final weights.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from tests.jobs import sharding
from tests.matrix.mutations import MUTATIONS
from tests.oracle import NUM_SAMPLES, TOPK_RATIO, Case, UnevenBatches, build_dataset, build_network
from tests.oracle import build_optimizer as build_optimizer_of
from toolkit import BridgeConfig, GradientDonor, GradientReceiver
from toolkit.bridge.injection import Injector
from toolkit.bridge.transport import DirectoryTransport


def prepare(
    accelerator: Accelerator, case: Case, head: str
) -> tuple[nn.Module, torch.optim.Optimizer, DataLoader[Any]]:
    """The case's model, optimizer and uneven batches for the job that trains ``head``."""
    network = build_network(case, ("h1", "h2") if head == "h1" else ("h2",))
    if head == "h1":
        network.heads["h2"].requires_grad_(False)
    model: nn.Module = network
    optimizer = build_optimizer_of(case, model)
    batches = UnevenBatches(NUM_SAMPLES[head], case.seed + (7 if head == "h1" else 8))
    dataloader = DataLoader(build_dataset(case, head), batch_sampler=batches)
    if sharding.is_asked_for(case, head):
        model, optimizer = sharding.shard(accelerator, case, model)
        return model, optimizer, accelerator.prepare(dataloader)
    if case.prepared:
        model = accelerator.prepare(model)
    optimizer, dataloader = accelerator.prepare(optimizer, dataloader)
    return model, optimizer, dataloader


def receive(accelerator: Accelerator, case: Case, config: BridgeConfig) -> nn.Module:
    """Train the receiver of a case."""
    accelerator.gradient_accumulation_steps = case.accumulation
    model, optimizer, dataloader = prepare(accelerator, case, "h1")
    with GradientReceiver(accelerator, model, optimizer, config) as receiver:
        epoch = 0
        while receiver.completed_steps < case.num_steps:
            dataloader.set_epoch(epoch)  # type: ignore[attr-defined]
            for features, labels in dataloader:
                with accelerator.accumulate(model):
                    loss = F.cross_entropy(
                        model(features, "h1"), labels, reduction=case.loss_reduction
                    )
                    receiver.backward(loss, num_samples=len(labels))
                    receiver.inject()
                    if accelerator.sync_gradients and case.max_grad_norm is not None:
                        accelerator.clip_grad_norm_(model.parameters(), case.max_grad_norm)
                    optimizer.step()
                    optimizer.zero_grad()
                    if receiver.commit():
                        staleness = receiver.metrics.get(
                            "bridge/staleness donor (receiver steps)", 0
                        )
                        assert staleness <= case.max_staleness
                if sharding.is_asked_for(case, "h1"):
                    sharding.evaluate(model, features, "h1")
                if receiver.completed_steps == case.num_steps:
                    break
            epoch += 1
        if accelerator.is_main_process:
            fates = receiver.fates()
            (receiver.run_dir / "fates.json").write_text(json.dumps(fates))
            if not case.max_staleness and case.exchange == "gradient":
                assert fates["applied"] == case.num_steps, fates
            settled = sum(fates[k] for k in ("applied", "dropped", "rejected", "skipped"))
            assert settled + fates["pending"] == fates["published"], fates
    return model


def donate(accelerator: Accelerator, case: Case, config: BridgeConfig) -> nn.Module:
    """Follow the receiver of a case until it has ended."""
    accelerator.gradient_accumulation_steps = case.donor_accumulation
    model, optimizer, dataloader = prepare(accelerator, case, "h2")
    with GradientDonor(accelerator, model, optimizer, config) as donor:
        for features, labels in donor.follow(dataloader):
            time.sleep(case.donor_pause)
            with accelerator.accumulate(model):
                loss = F.cross_entropy(model(features, "h2"), labels, reduction=case.loss_reduction)
                donor.backward(loss, num_samples=len(labels))
                if not donor.publish():
                    assert donor.following or case.exchange == "head", "the donor went alone"
                    if accelerator.sync_gradients and case.max_grad_norm is not None:
                        accelerator.clip_grad_norm_(model.parameters(), case.max_grad_norm)
                    optimizer.step()
                optimizer.zero_grad()
            if sharding.is_asked_for(case, "h2"):
                sharding.evaluate(model, features, "h2")
    return model


# -- deliberate faults, beside those of the matrix and of sharding ------------------------------

_weigh = Injector.weigh
_publish = DirectoryTransport.publish


def _other_weights(self: Injector, backbone: Tensor) -> list[float]:
    return _weigh(self, backbone)[::-1]


def _bad_files(
    self: DirectoryTransport, job: str, sequence: int, write: Callable[[Path], object]
) -> int:
    """Not a wrong factor but a bad disk: one payload is cut in half, and strangers lie about."""
    if job == "donor" and sequence == 0:
        self.path(job, sequence).with_name("notes.txt").write_text("not a payload")
        self.path(job, 9).write_bytes(b"nor is this")
    is_torn = (job, sequence) == ("donor", 5)
    return _publish(self, job, sequence, sharding.half_of(write) if is_torn else write)


FAULTS: dict[str, tuple[Any, str, Any]] = {
    "other weights": (Injector, "weigh", _other_weights),
    "bad files": (DirectoryTransport, "publish", _bad_files),
    **sharding.MUTATIONS,
}


def replacement(fault: str, role: str) -> tuple[Any, str, Any] | None:
    """What a fault replaces in one job: whose method, its name and the other method."""
    if fault not in MUTATIONS:
        return FAULTS[fault] if fault else None
    mutation = MUTATIONS[fault]
    is_here = mutation.role == role
    return (mutation.owner, mutation.method, mutation.replacement) if is_here else None


DELTA = ("local_steps", "outer_learning_rate", "outer_momentum")  # settings of this exchange only


def main() -> None:
    """Train every case of the list in one role."""
    parser = argparse.ArgumentParser()
    parser.add_argument("role", choices=["donor", "receiver"])
    parser.add_argument("cases", type=Path, help="JSON list of cases")
    parser.add_argument("output", type=Path, help="directory for runs and final weights")
    parser.add_argument("--expect_processes", type=int, required=True)
    args = parser.parse_args()

    accelerator = Accelerator(
        cpu=True, dataloader_config=DataLoaderConfiguration(even_batches=False)
    )
    assert accelerator.num_processes == args.expect_processes
    train = receive if args.role == "receiver" else donate
    for fields in json.loads(args.cases.read_text()):
        case = Case(**fields)
        config = BridgeConfig(
            runs_dir=args.output / case.name / "runs",
            scope=case.scope,
            rescale=case.rescale,
            aggregate=case.aggregate,
            donor_weight=case.donor_weight,
            loss_reduction=case.loss_reduction,
            exchange=case.exchange,
            init_h2=case.init_h2 if args.role == "receiver" else "own",
            require_peer=True,
            max_staleness=case.max_staleness,
            compression=case.compression,
            topk_ratio=TOPK_RATIO if case.compression == "topk" else BridgeConfig().topk_ratio,
            **({name: getattr(case, name) for name in DELTA} if case.exchange == "delta" else {}),
        )
        with contextlib.ExitStack() as stack:
            if found := replacement(case.mutation, args.role):
                stack.enter_context(mock.patch.object(*found))
            if case.prepared and case.sharded in (args.role, "both"):
                stack.enter_context(sharding.fsdp2(accelerator, **sharding.SETTINGS[args.role]))
            model = train(accelerator, case, config)
        state = sharding.full_tensors(accelerator.unwrap_model(model).state_dict())
        rank = accelerator.process_index
        save_file(state, args.output / case.name / f"{args.role}-{rank}.safetensors")
        accelerator.wait_for_everyone()
        accelerator.free_memory()
    accelerator.end_training()


if __name__ == "__main__":
    main()
