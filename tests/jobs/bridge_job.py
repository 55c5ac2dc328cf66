"""One job of a bridge, donor or receiver, over a list of cases (see ``tests/oracle.py``).

Launched with ``accelerate launch``; one launch trains every case, each in a runs directory of its
own, and writes every rank's final weights.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
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
from tests.oracle import NUM_SAMPLES, TOPK_RATIO, Case, UnevenBatches, build_dataset, build_network
from tests.oracle import build_optimizer as build_optimizer_of
from toolkit import BridgeConfig, GradientDonor, GradientReceiver
from toolkit.bridge import accumulation
from toolkit.bridge.injection import Injector
from toolkit.bridge.payload import Record
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


# -- deliberate faults: each makes the bridge wrong in one way --------------------------------

_add = Injector.add_
_weigh = Injector.weigh
_load = GradientDonor._load
_close = accumulation.WindowAccumulator.close
_backward = accumulation.WindowAccumulator.backward
_publish_window = GradientDonor._publish_window
_publish = DirectoryTransport.publish


def _scaled(factor: Callable[[Injector], float]) -> Callable[..., None]:
    def add(self: Injector, tensors: Any, donor_factor: float, weight: float) -> None:
        _add(self, tensors, donor_factor * factor(self), weight)

    return add


def _twice(self: Injector, tensors: Any, factor: float, weight: float) -> None:
    _add(self, tensors, factor, weight)
    _add(self, tensors, factor, weight)


def _on_one_rank(self: Injector, tensors: Any, factor: float, weight: float) -> None:
    if self.accelerator.is_main_process:
        _add(self, tensors, factor, weight)


def _drop_tensor(self: Injector, tensors: dict[str, Tensor], factor: float, weight: float) -> None:
    name = next(iter(self.shared.head))
    _add(self, {**tensors, name: torch.zeros_like(tensors[name])}, factor, weight)


def _other_weights(self: Injector, backbone: Tensor) -> list[float]:
    return _weigh(self, backbone)[::-1]


def _stale_by_one(self: GradientDonor, record: Record) -> None:
    previous = getattr(self, "_previous", record)
    self._previous = record  # type: ignore[attr-defined]
    _load(self, Record(header=record.header, tensors=previous.tensors, num_bytes=0))


def _forget(attribute: str) -> Callable[..., Any]:
    """Leave the world size or the accumulation steps out of the sum's factor."""

    def close(self: accumulation.WindowAccumulator, *extra: Any) -> accumulation.Window:
        window = _close(self, *extra)
        factor = window.sum_factor / getattr(self._accelerator, attribute)
        return accumulation.Window(window.count, window.loss, factor, window.scale)

    return close


def _mean_for_sum(self: GradientDonor, window: accumulation.Window) -> None:
    factor = window.sum_factor / window.count
    _publish_window(self, accumulation.Window(window.count, window.loss, factor, window.scale))


def _mean_of_means(self: accumulation.WindowAccumulator, loss: Tensor, num_samples: float) -> None:
    """What plain Accelerate does with unequal batches, made into a 'sum' afterwards."""
    fake = getattr(self, "_typical", num_samples)
    self._typical = fake  # type: ignore[attr-defined]
    _backward(self, loss * (fake / num_samples), num_samples)


def _bad_files(
    self: DirectoryTransport, job: str, sequence: int, write: Callable[[Path], object]
) -> int:
    """Not a wrong factor but a bad disk: one payload is cut in half, and strangers lie about."""
    if job == "donor" and sequence == 0:
        self.path(job, sequence).with_name("notes.txt").write_text("not a payload")
        self.path(job, 9).write_bytes(b"nor is this")

    def write_half(path: Path) -> None:
        write(path)
        os.truncate(path, path.stat().st_size // 2)

    return _publish(self, job, sequence, write_half if (job, sequence) == ("donor", 5) else write)


DELTA = ("local_steps", "outer_learning_rate", "outer_momentum")  # settings of this exchange only
MUTATIONS: dict[str, tuple[Any, str, Any]] = {
    "half": (Injector, "add_", _scaled(lambda job: 0.5)),
    "times_world_size": (
        Injector, "add_", _scaled(lambda job: job.accelerator.num_processes),
    ),
    "twice": (Injector, "add_", _twice),
    "on_one_rank": (Injector, "add_", _on_one_rank),
    "drop_tensor": (Injector, "add_", _drop_tensor),
    "stale_by_one": (GradientDonor, "_load", _stale_by_one),
    "forget_accumulation": (
        accumulation.WindowAccumulator, "close", _forget("gradient_accumulation_steps"),
    ),
    "forget_world_size": (accumulation.WindowAccumulator, "close", _forget("num_processes")),
    "mean_for_sum": (GradientDonor, "_publish_window", _mean_for_sum),
    "other_weights": (Injector, "weigh", _other_weights),
    "bad_files": (DirectoryTransport, "publish", _bad_files),
    "mean_of_means": (accumulation.WindowAccumulator, "backward", _mean_of_means),
}  # fmt: skip


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
        faults = MUTATIONS | sharding.MUTATIONS
        patches = [mock.patch.object(*faults[case.mutation])] if case.mutation else []
        for patch in patches:
            patch.start()
        sharded: contextlib.AbstractContextManager[None]
        if case.prepared and case.sharded in (args.role, "both"):
            sharded = sharding.fsdp2(accelerator, **sharding.SETTINGS[args.role])
        else:
            sharded = contextlib.nullcontext()
        with sharded:
            model = train(accelerator, case, config)
        for patch in patches:
            patch.stop()
        state = sharding.full_tensors(accelerator.unwrap_model(model).state_dict())
        rank = accelerator.process_index
        save_file(state, args.output / case.name / f"{args.role}-{rank}.safetensors")
        accelerator.wait_for_everyone()
        accelerator.free_memory()
    accelerator.end_training()


if __name__ == "__main__":
    main()
