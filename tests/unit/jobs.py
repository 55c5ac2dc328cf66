"""One side of a bridge in this process, the other side's records written by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor, nn
from torch.nn import functional as F

from tests.oracle import Case, Network, build_dataset, build_network
from toolkit import BridgeConfig, GradientDonor, GradientReceiver
from toolkit.bridge.collector import Findings
from toolkit.bridge.digests import digest_tensors
from toolkit.bridge.payload import Header, Kind, Record, parse_record, write_record
from toolkit.bridge.teacher import TeacherFactory


def reset() -> None:
    """Forget the process-wide state that Accelerate keeps."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    PartialState._reset_state()


def build_accelerator(accumulation: int, init_scale: float | None) -> Accelerator:
    """On the CPU; with a loss scaler of this scale, if any, to be switched on by ``native_amp``."""
    accelerator = Accelerator(
        cpu=True,
        gradient_accumulation_steps=accumulation,
        mixed_precision="no" if init_scale is None else "fp16",
    )
    if init_scale is not None:
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=init_scale)
    return accelerator


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Its parameters as they are now."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def batches(head: str, sizes: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of these sizes, from the start of the head's data."""
    features, labels = build_dataset(Case(), head)[: sum(sizes)]
    yield from zip(features.split(sizes), labels.split(sizes), strict=True)


def same_tensors(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether both have the same names, with equal values."""
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def look_once(receiver: GradientReceiver) -> Findings | None:
    """One look at the donors' streams, as a step that waits takes it."""
    may_teach = receiver._lessons is not None
    return receiver._collector.poll(receiver.completed_steps, receiver.taught_heads, may_teach)


class ReceiverAlone:
    """A receiver whose donor is this test.

    Args:
        runs_dir: of the run.
        init_scale: begin with a loss scaler of this scale; None for none.
        fused: use the fused optimizer, whose own skip flag is unreliable.
        teacher_factory: of the receiver.
        rests: names of parameters that are frozen before all.
        settings: of the bridge.
    """

    def __init__(
        self,
        runs_dir: Path,
        accumulation: int = 1,
        init_scale: float | None = None,
        fused: bool = False,
        teacher_factory: TeacherFactory | None = None,
        rests: Sequence[str] = (),
        **settings: Any,
    ) -> None:
        self.accelerator = accelerator = build_accelerator(accumulation, init_scale)
        network = build_network(Case(dtype="float64" if init_scale is None else "float32"))
        network.heads["h2"].requires_grad_(False)
        for name in rests:
            network.get_parameter(name).requires_grad_(False)
        self.network = network
        self.model: nn.Module = accelerator.prepare(network)
        accelerator.native_amp = init_scale is not None
        optimizer = torch.optim.AdamW(network.parameters(), lr=0.01, fused=fused)
        self.optimizer = accelerator.prepare(optimizer)
        config = BridgeConfig(**{"runs_dir": runs_dir, "peer_wait": 0.2, **settings})
        self.receiver = GradientReceiver(
            accelerator, self.model, self.optimizer, config, teacher_factory=teacher_factory
        )
        self.receiver.transport.open_stream("donor")
        self.published = 0

    def weights_record(self) -> Record:
        """The newest weights that the receiver published."""
        self.receiver._waiting.catch_up()
        transport = self.receiver.transport
        newest = transport.sequences("receiver")[-1]
        return parse_record(transport.read("receiver", newest, max_bytes=10**6), transport.signer)

    def donate(
        self,
        tensors: dict[str, Tensor] | None,
        count: float = 4.0,
        kind: Kind = "gradient",
        weights: Header | None = None,
        **changes: Any,
    ) -> None:
        """Answer ``weights``, by default the newest."""
        weights = weights or self.weights_record().header
        header = Header(
            kind=kind, run_id=weights.run_id, job="donor", sequence=self.published,
            attempt=weights.attempt, receiver_step=weights.receiver_step,
            weights_digest=weights.weights_digest, head="heads.h2", count=count,
            **changes,
        )  # fmt: skip
        transport = self.receiver.transport
        transport.publish(
            "donor",
            self.published,
            lambda path: write_record(path, header, tensors or {}, transport.signer),
        )
        self.published += 1

    def constant(self, value: float) -> dict[str, Tensor]:
        """A gradient sum with the same value everywhere."""
        return {
            name: torch.full_like(parameter, value).detach()
            for name, parameter in self.receiver._gradient_parameters("heads.h2").items()
        }

    def backward(self, size: int = 5, factor: float = 1.0) -> None:
        """One micro-batch."""
        inputs, labels = next(batches("h1", [size]))
        dtype = next(self.network.parameters()).dtype
        loss = F.cross_entropy(self.network(inputs.to(dtype), "h1"), labels) * factor
        self.receiver.backward(loss, num_samples=size)

    def step(self, factor: float = 1.0) -> bool:
        """A whole step of one micro-batch; whether it happened."""
        with self.accelerator.accumulate(self.model):
            self.backward(factor=factor)
            self.receiver.inject()
            self.optimizer.step()
            self.optimizer.zero_grad()
            return self.receiver.commit()


class DonorAlone:
    """A donor whose receiver does not come, or is this test.

    Args:
        runs_dir: of the run.
        rests: names of parameters that are frozen before all.
        settings: of the bridge.
    """

    def __init__(
        self, runs_dir: Path, accumulation: int = 1, rests: Sequence[str] = (), **settings: Any
    ) -> None:
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
        network: Network = build_network(Case(), ("h2",))
        for name in rests:
            network.get_parameter(name).requires_grad_(False)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        self.model, self.optimizer = self.accelerator.prepare(network, optimizer)
        config = BridgeConfig(runs_dir=runs_dir, peer_wait=0.1, **settings)
        self.donor = GradientDonor(self.accelerator, self.model, self.optimizer, config)
        self.network = network
        self.published = 0

    def publish_weights(
        self, step: int, fill: float, kind: Kind = "weights", noise: bool = False
    ) -> None:
        """Publish weights as a receiver after ``step`` steps.

        Args:
            step: of the receiver.
            fill: the value of all of them.
            kind: of the record.
            noise: add noise, of ``step`` alone: equal weights have equal gradients.
        """
        transport = self.donor.transport
        transport.open_stream("receiver")
        tensors = {
            name: torch.full_like(tensor, fill).detach()
            for name, tensor in self.donor.shared.weights.items()
        }
        if noise:
            generator = torch.Generator().manual_seed(step)
            for name in sorted(tensors):
                tensors[name] += torch.randn(tensors[name].shape, generator=generator)
        header = Header(
            kind=kind, run_id=self.donor.run_id, job="receiver", sequence=self.published,
            attempt=1, receiver_step=step, weights_digest=digest_tensors(tensors),
        )  # fmt: skip
        transport.publish(
            "receiver",
            self.published,
            lambda path: write_record(path, header, tensors, transport.signer),
        )
        self.published += 1

    def payload(self, sequence: int) -> Record:
        """What the donor published."""
        self.donor._waiting.catch_up()
        transport = self.donor.transport
        return parse_record(transport.read("donor", sequence, max_bytes=10**6), transport.signer)


StartReceiver = Callable[..., ReceiverAlone]
StartDonor = Callable[..., DonorAlone]
