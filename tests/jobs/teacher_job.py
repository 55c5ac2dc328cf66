"""A receiver with a teacher, over a list of settings; the donor's records are written by hand.

Launched with ``accelerate launch``; every rank writes its final weights, and the main process
which teacher each window had.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F
from torch.utils.data import DataLoader

from tests.jobs import sharding
from tests.jobs.teacher_setting import (
    CORE,
    DONOR_WEIGHT,
    OVERFLOWS,
    REST,
    STREAM,
    TEMPERATURE,
    Both,
    Donor,
    OneHead,
    Setting,
    build_accelerator,
    has_teacher,
    teacher_weights,
)
from tests.oracle import NUM_SAMPLES, UnevenBatches, build_dataset
from tests.oracle import build_optimizer as build_optimizer_of
from toolkit import BridgeConfig, GradientReceiver
from toolkit.bridge import teachers as reading
from toolkit.bridge.payload import parse_header, write_record
from toolkit.bridge.transport import DirectoryTransport


class Counter:
    """Counts calls of the bridge's collectives."""

    def __init__(self) -> None:
        self.value = 0

    def counted(self, name: str) -> contextlib.AbstractContextManager[Any]:
        """Patch one function of ``torch.distributed``."""
        function = getattr(dist, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            self.value += 1
            return function(*args, **kwargs)

        return mock.patch.object(dist, name, call)


def bad_disk(
    accelerator: Accelerator, setting: Setting, directory: Path
) -> contextlib.AbstractContextManager[Any]:
    """The last rank never sees the second weights, or sees others under their name."""
    read = DirectoryTransport.read

    def read_badly(
        self: DirectoryTransport, job: str, sequence: int, *, max_bytes: int
    ) -> memoryview:
        data = read(self, job, sequence, max_bytes=max_bytes)
        if not accelerator.is_last_process or (job, sequence) != (STREAM, 1):
            return data
        if setting.fault == "missing":
            raise FileNotFoundError(sequence)
        write_record(directory / "other", parse_header(data), teacher_weights(setting, 9))
        return memoryview((directory / "other").read_bytes())

    return mock.patch.object(DirectoryTransport, "read", read_badly)


def prepare(setting: Setting, accelerator: Accelerator) -> tuple[nn.Module, Any, Any]:
    """The receiver's model, optimizer and uneven batches."""
    network = Both(setting)
    if setting.wrapper != "fsdp2":
        network.heads["h2"].requires_grad_(False)
    if setting.compiled:
        network.backbone = torch.compile(network.backbone, backend="eager")  # type: ignore
    batches = UnevenBatches(NUM_SAMPLES["h1"], setting.case.seed + 7)
    dataloader = DataLoader(build_dataset(setting.case, "h1"), batch_sampler=batches)
    model: nn.Module = network
    optimizer = build_optimizer_of(setting.case, model)
    if setting.wrapper == "none":
        optimizer, dataloader = accelerator.prepare(optimizer, dataloader)
    else:
        model, optimizer, dataloader = accelerator.prepare(model, optimizer, dataloader)
    assert isinstance(model, FSDPModule) == (setting.wrapper == "fsdp2")
    return model, optimizer, dataloader


def train(setting: Setting, directory: Path) -> None:
    """One receiver, to the end."""
    accelerator = build_accelerator(setting)
    config = BridgeConfig(
        runs_dir=directory / "runs",
        exchange="distill",
        donor_weight=DONOR_WEIGHT,
        loss_reduction=setting.case.loss_reduction,
        distill_loss=setting.distill_loss,  # type: ignore[arg-type]
        temperature=TEMPERATURE,
        peer_wait=20.0,
    )
    donor = Donor(setting, config) if accelerator.is_main_process else None
    if donor is not None:
        donor.publish_next()
    accelerator.wait_for_everyone()
    with contextlib.ExitStack() as stack:
        if setting.wrapper == "fsdp2":
            stack.enter_context(sharding.fsdp2(accelerator, **sharding.BY_LAYER))
        model, optimizer, dataloader = prepare(setting, accelerator)
        factory = (lambda: OneHead(setting)) if setting.wrapper == "fsdp2" else None
        stack.enter_context(mock.patch.object(reading, "LOOK_SECONDS", 0.0))
        stack.enter_context(mock.patch.object(reading, "READ_SECONDS", 0.1))
        if setting.fault in ("missing", "other"):
            stack.enter_context(bad_disk(accelerator, setting, directory))
        counter = Counter()
        for name in ("all_reduce", "broadcast_object_list"):
            stack.enter_context(counter.counted(name))
        with GradientReceiver(
            accelerator, model, optimizer, config, teacher_factory=factory
        ) as receiver:
            steps = []
            for step in loop(setting, accelerator, model, optimizer, dataloader, receiver, donor):
                steps.append({**step, "num_collectives": counter.value})
                counter.value = 0
    state = sharding.full_tensors(accelerator.unwrap_model(model).state_dict())
    rank = accelerator.process_index
    state = {name.replace("_orig_mod.", ""): tensor for name, tensor in state.items()}
    save_file(state, directory / f"receiver-{rank}.safetensors")
    if accelerator.is_main_process:
        (directory / "steps.json").write_text(json.dumps(steps))
    accelerator.wait_for_everyone()
    accelerator.free_memory()


def loop(
    setting: Setting,
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Any,
    dataloader: Any,
    receiver: GradientReceiver,
    donor: Donor | None,
) -> Iterator[dict[str, Any]]:
    """The training loop; which version taught each window, whether it stepped, and its metrics."""
    case = setting.case
    assert receiver._lessons is not None
    teachers = receiver._lessons.teachers
    num_versions, epoch = 3 if setting.by_turns else 1, 0
    taught_by: set[int | None] = set()
    versions: set[int | None] = set()  # in the present window
    while True:
        dataloader.set_epoch(epoch)
        for features, labels in dataloader:
            window = receiver.completed_windows
            with contextlib.ExitStack() as stack:
                stack.enter_context(accelerator.accumulate(model))
                if setting.no_sync and window < 4:
                    stack.enter_context(accelerator.no_sync(model))
                taught = receiver.taught_heads
                outputs = model(features, ("h1", *(["h2"] if taught else [])))
                loss = F.cross_entropy(outputs["h1"], labels, reduction=case.loss_reduction)
                for head in taught:
                    loss = loss + receiver.teacher_loss(outputs["h2"], features, head=head)
                if setting.precision == "fp16" and window in OVERFLOWS:
                    is_last = accelerator.is_last_process
                    loss = loss * (torch.finfo(loss.dtype).max / 4 if is_last else 1.0)
                receiver.backward(loss, num_samples=len(labels))
                newest = teachers.working["donor"].offer.donor_step
                version = newest if taught else None
                versions.add(version)
                # What counts from the next window on.
                is_taught = has_teacher(setting, window + 1)
                teachers.at_work = frozenset(receiver.shared.heads if is_taught else ())
                receiver.inject()
                metrics = dict(receiver.metrics)
                for parameter in receiver.shared.head.values():
                    # FSDP2 does not wait for what gets no gradient.
                    assert parameter.requires_grad == bool(taught) or setting.wrapper == "fsdp2"
                    assert not accelerator.sync_gradients or bool(taught) == (
                        parameter.grad is not None
                    )
                optimizer.step()
                optimizer.zero_grad()
                stepped = receiver.commit()
                assert not accelerator.sync_gradients or receiver.completed_windows == window + 1
            if not accelerator.sync_gradients:
                continue
            assert len(versions) == 1, "the teacher changed within a window"
            versions.clear()
            yield {"version": version, "stepped": stepped, "metrics": metrics}
            taught_by.add(version)
            if donor is not None and donor.version < num_versions and donor.is_used_up(taught_by):
                donor.publish_next()
            if receiver.completed_steps >= setting.num_steps and num_versions in taught_by:
                return
        epoch += 1


def main() -> None:
    """Every setting."""
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("settings", choices=["core", "rest"])
    args = parser.parse_args()
    assert Accelerator(cpu=True).num_processes == 2
    for setting in CORE if args.settings == "core" else REST:
        directory = args.output / setting.name
        directory.mkdir(exist_ok=True)
        train(setting, directory)
    Accelerator(cpu=True).end_training()


if __name__ == "__main__":
    main()
