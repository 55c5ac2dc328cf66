"""What is trained with a teacher on two ranks, and the donor that publishes its weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn

from tests import IS_OLD_FSDP2
from tests.oracle import Case, build_network
from tests.terms import distill_terms
from toolkit import BridgeConfig
from toolkit.bridge.digests import digest_tensors
from toolkit.bridge.payload import Header, write_record
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
