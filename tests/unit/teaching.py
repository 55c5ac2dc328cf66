"""A donor of weights and a receiver that learns from them, in one process."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional as F

from tests.oracle import Case, build_network
from tests.terms import distill_terms
from tests.unit.jobs import batches, reset
from toolkit import BridgeConfig, GradientReceiver
from toolkit.bridge.authentication import Signer
from toolkit.bridge.digests import digest_tensors
from toolkit.bridge.payload import Header, Kind, write_record
from toolkit.bridge.runs import attach
from toolkit.bridge.transport import DirectoryTransport

HEAD = "heads.h2"

Learners = Callable[..., "Receiver"]  # starts one, which the fixture closes


def weights(seed: int) -> dict[str, Tensor]:
    return build_network(Case(seed=seed), ("h2",)).state_dict()


class Donor:
    """Attaches to a run, and writes weights into its stream."""

    def __init__(self, runs_dir: Path, name: str = "donor", key: bytes | None = None) -> None:
        config = BridgeConfig(runs_dir=runs_dir, run="0001", donor_name=name, exchange="distill")
        attachment = attach("donor", config, distill_terms(HEAD), {}, Signer(key))
        self.name, self.stream = name, f"{name}.weights"
        self.run_id = attachment.run_id
        self.transport = DirectoryTransport(
            attachment.run_dir / "bridge", Signer(key, attachment.run_id)
        )
        for stream in (name, self.stream):
            self.transport.open_stream(stream)

    def header(self, sequence: int, tensors: dict[str, Tensor]) -> Header:
        return Header(
            kind="weights", run_id=self.run_id, job=self.stream, sequence=sequence, attempt=1,
            receiver_step=0, weights_digest=digest_tensors(tensors), head=HEAD,
            donor_step=10 * (sequence + 1),
        )  # fmt: skip

    def teach(self, sequence: int, tensors: dict[str, Tensor], **changes: Any) -> None:
        header = dataclasses.replace(self.header(sequence, tensors), **changes)
        signer = self.transport.signer
        self.transport.publish(
            self.stream, sequence, lambda p: write_record(p, header, tensors, signer)
        )

    def damage(self, sequence: int) -> None:
        path = self.transport.path(self.stream, sequence)
        path.write_bytes(path.read_bytes()[:-5])

    def end(self) -> None:
        kind: Kind = "end"
        header = dataclasses.replace(self.header(0, {}), kind=kind, job=self.name)
        self.transport.publish(self.name, 0, lambda path: write_record(path, header, {}))

    def reason(self, sequence: int) -> str | None:
        return self.transport.rejection(self.stream, sequence)


class Receiver:
    """A receiver in exchange ``distill``."""

    def __init__(self, runs_dir: Path, settings: dict[str, Any], **keywords: Any) -> None:
        reset()
        self.accelerator = Accelerator(cpu=True)
        self.network = build_network(Case())
        self.network.heads["h2"].requires_grad_(False)
        optimizer = torch.optim.AdamW(self.network.parameters(), lr=0.01)
        self.model, self.optimizer = self.accelerator.prepare(self.network, optimizer)
        config = BridgeConfig(
            **{"runs_dir": runs_dir, "peer_wait": 30.0, "exchange": "distill", **settings}
        )
        self.receiver = GradientReceiver(
            self.accelerator, self.model, self.optimizer, config, **keywords
        )
        self.features, self.labels = next(batches("h1", [6]))

    def logits(self) -> Tensor:
        logits: Tensor = self.network(self.features, "h2")
        return logits

    def step(self) -> None:
        with self.accelerator.accumulate(self.model):
            loss = F.cross_entropy(self.network(self.features, "h1"), self.labels)
            if self.receiver.taught_heads:
                loss = loss + self.receiver.teacher_loss(self.logits(), self.features)
            self.receiver.backward(loss, num_samples=len(self.labels))
            self.receiver.inject()
            self.optimizer.step()
            self.optimizer.zero_grad()
            assert self.receiver.commit()

    def steps_until(self, condition: Callable[[], object]) -> None:
        """Train on, which waits for nothing, until something has been read."""
        for _ in range(3000):
            if condition():
                return
            self.step()
        raise AssertionError("it never came")

    def versions(self) -> dict[str, int]:
        assert self.receiver._lessons is not None
        working = self.receiver._lessons.teachers.working
        return {donor: w.offer.donor_step for donor, w in working.items()}
