"""A receiver with a teacher, over a list of settings; the donor's records are written by hand.

Launched with ``accelerate launch``; every rank writes its final weights, and the main process
which teacher each window had.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedDataParallelKwargs
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F
from torch.utils.data import DataLoader

from tests import IS_OLD_FSDP2
from tests.jobs import sharding
from tests.oracle import NUM_SAMPLES, Case, UnevenBatches, build_dataset, build_network
from tests.oracle import build_optimizer as build_optimizer_of
from tests.terms import distill_terms
from toolkit import BridgeConfig, GradientReceiver
from toolkit.bridge import teachers as reading
from toolkit.bridge.digests import digest_tensors
from toolkit.bridge.payload import Header, parse_header, write_record
from toolkit.bridge.runs import attach
from toolkit.bridge.transport import DirectoryTransport

HEAD, STREAM = "heads.h2", "donor.weights"
TEMPERATURE, DONOR_WEIGHT = 2.5, 0.7
OVERFLOWS = (2, 5)  # windows whose loss is too large on the last rank, with a loss scaler
INIT_SCALE = 2.0**10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """How the receiver is prepared, and what its teacher does."""

    wrapper: str = "ddp"  # or "static_graph", "find_unused", "bucket_view", "none", "fsdp2"
    accumulation: int = 3
    loss_reduction: str = "mean"
    distill_loss: str = "kl"
    optimizer: str = "adamw"
    num_steps: int = 12
    by_turns: bool = False  # the teacher rests in some windows, and is replaced by newer ones
    no_sync: bool = False  # all backwards of the first windows run under no_sync, by hand
    precision: str = "no"
    compiled: bool = False
    fault: str = ""  # second weights: "damaged", or "missing" or "other" ones on the last rank

    @property
    def case(self) -> Case:
        """The model, the data and the optimizer."""
        dtype = "float32" if self.precision == "bf16" else "float64"
        reduction: Any = self.loss_reduction
        return Case(
            accumulation=self.accumulation,
            loss_reduction=reduction,
            optimizer=self.optimizer,
            dtype=dtype,
        )

    @property
    def name(self) -> str:
        """What is not the default."""
        changed = [
            f"{field.name}={value}"
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) != field.default
        ]
        return ",".join(changed) or "default"


CORE = [
    Setting(by_turns=True),
    Setting(by_turns=True, fault="other"),
    Setting(wrapper="static_graph", by_turns=True, accumulation=1),
    Setting(precision="fp16", by_turns=True),
    *([] if IS_OLD_FSDP2 else [Setting(wrapper="fsdp2", by_turns=True, accumulation=2)]),
]
REST = [
    Setting(),
    Setting(by_turns=True, fault="damaged"),
    Setting(by_turns=True, fault="missing"),
    Setting(wrapper="find_unused", by_turns=True, optimizer="momentum", accumulation=1),
    Setting(wrapper="bucket_view", loss_reduction="sum", optimizer="sgd", by_turns=True),
    Setting(wrapper="none", distill_loss="mse", by_turns=True),
    Setting(no_sync=True, by_turns=True),
    Setting(compiled=True, by_turns=True),
    Setting(precision="bf16", optimizer="sgd"),
]


def has_teacher(setting: Setting, window: int) -> bool:
    """Whether the teacher teaches in this window, where it teaches by turns."""
    return not setting.by_turns or window % 5 in (1, 2, 3)


def teacher_weights(setting: Setting, version: int) -> dict[str, Tensor]:
    """The donor's weights when it has trained ``version`` windows."""
    case = dataclasses.replace(setting.case, seed=100 + version)
    tensors = build_network(case, ("h2",)).state_dict()
    return {name: 3 * tensor for name, tensor in tensors.items()}  # far from uniform


class Donor:
    """Publishes a teacher's weights."""

    def __init__(self, setting: Setting, config: BridgeConfig) -> None:
        self.setting, self.version = setting, 0
        attachment = attach("donor", config, distill_terms(HEAD), {})
        self.run_id = attachment.run_id
        self.transport = DirectoryTransport(attachment.run_dir / "bridge")
        for stream in ("donor", STREAM):
            self.transport.open_stream(stream)

    def is_used_up(self, taught_by: set[int | None]) -> bool:
        """Whether the newest weights have taught, or have been put aside."""
        is_aside = self.transport.rejection(STREAM, self.version - 1) is not None
        return self.version in taught_by or is_aside

    def publish_next(self) -> None:
        """Write the next record."""
        sequence = self.version
        self.version += 1
        tensors = teacher_weights(self.setting, self.version)
        header = Header(
            kind="weights", run_id=self.run_id, job=STREAM, sequence=sequence, attempt=1,
            receiver_step=0, weights_digest=digest_tensors(tensors), head=HEAD,
            donor_step=self.version,
        )  # fmt: skip

        def write(path: Path) -> None:
            write_record(path, header, tensors)
            if self.setting.fault == "damaged" and self.version == 2:
                data = bytearray(path.read_bytes())
                data[-1] ^= 1  # one bit of the last tensor
                path.write_bytes(data)

        self.transport.publish(STREAM, sequence, write)


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


class OneHead(nn.Module):
    """What a user's factory makes."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        network = build_network(setting.case, ("h2",))
        self.backbone, self.heads = network.backbone, network.heads

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.heads["h2"](self.backbone(features))
        return logits


class Both(nn.Module):
    """A receiver's network: the logits of several heads from one pass through the backbone."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        network = build_network(setting.case)
        self.backbone, self.heads = network.backbone, network.heads

    def forward(self, features: Tensor, heads: tuple[str, ...]) -> dict[str, Tensor]:
        hidden = self.backbone(features)
        return {head: self.heads[head](hidden) for head in heads}


def build_accelerator(setting: Setting) -> Accelerator:
    """A fresh one, in the process group that there is."""
    AcceleratorState._reset_state(reset_partial_state=False)
    GradientState._reset_state()
    accelerator = Accelerator(
        cpu=True,
        mixed_precision=setting.precision,
        gradient_accumulation_steps=setting.accumulation,
        dataloader_config=DataLoaderConfiguration(even_batches=False),
        kwargs_handlers=[
            DistributedDataParallelKwargs(
                static_graph=setting.wrapper == "static_graph",
                find_unused_parameters=setting.wrapper == "find_unused",
                gradient_as_bucket_view=setting.wrapper == "bucket_view",
            )
        ],
    )
    if setting.precision == "fp16":
        accelerator.native_amp = True
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=INIT_SCALE)
    return accelerator


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
    network = Both(setting)
    if setting.wrapper != "fsdp2":
        network.heads["h2"].requires_grad_(False)
    if setting.compiled:
        network.backbone = torch.compile(network.backbone, backend="eager")  # type: ignore
    batches = UnevenBatches(NUM_SAMPLES["h1"], setting.case.seed + 7)
    dataloader = DataLoader(build_dataset(setting.case, "h1"), batch_sampler=batches)
    with contextlib.ExitStack() as stack:
        if setting.wrapper == "fsdp2":
            stack.enter_context(sharding.fsdp2(accelerator, **sharding.BY_LAYER))
        model: nn.Module = network
        optimizer = build_optimizer_of(setting.case, model)
        if setting.wrapper == "none":
            optimizer, dataloader = accelerator.prepare(optimizer, dataloader)
        else:
            model, optimizer, dataloader = accelerator.prepare(model, optimizer, dataloader)
        assert isinstance(model, FSDPModule) == (setting.wrapper == "fsdp2")
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
