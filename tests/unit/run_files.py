"""Runs to inspect: one with every fate, and the mere files of one."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.unit.jobs import ReceiverAlone
from toolkit import cli
from toolkit.bridge.agreement import claim_name, to_json
from toolkit.bridge.authentication import UNSIGNED, Signer
from toolkit.bridge.digests import digest_tensors
from toolkit.bridge.ledger import Entry, Ledger, trail_path
from toolkit.bridge.payload import Header, Kind, write_record
from toolkit.bridge.signed_files import SignedFiles
from toolkit.bridge.transport import DirectoryTransport
from toolkit.inspection.command import watch

Inspect = Callable[..., tuple[int, dict[str, Any]]]


def inspecting(capsys: pytest.CaptureFixture[str], seconds: float) -> Inspect:
    """Runs the command; its exit status and the one run that it tells of."""

    def run(directory: Path, *flags: str) -> tuple[int, dict[str, Any]]:
        capsys.readouterr()
        status = cli.main(["inspect", str(directory), "--json", "--seconds", str(seconds), *flags])
        (found,) = json.loads(capsys.readouterr().out)["runs"]
        return status, found

    return run


def plain_files(directory: Path) -> list[Path]:
    """All files below a directory."""
    return [path for path in directory.rglob("*") if path.is_file()]


def num_bytes(directory: Path) -> int:
    """The size of all files below a directory, those with two names counted once."""
    return sum({p.stat().st_ino: p.stat().st_size for p in plain_files(directory)}.values())


def flip(path: Path) -> None:
    """Change one bit of the last tensor."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    """Take the last bytes away."""
    path.write_bytes(path.read_bytes()[:-5])


def tensors_of(sequence: int) -> dict[str, Tensor]:
    """What a record with this number holds."""
    return {"w": torch.full((3,), float(sequence))}


class SmallRun(ReceiverAlone):
    """A receiver in this process that has met every fate: 3 applied, 1 of each other one."""

    def __init__(self, runs_dir: Path, **settings: Any) -> None:
        super().__init__(runs_dir, **settings)
        self.run_dir = self.receiver.run_dir
        self.bridge = self.run_dir / "bridge"
        answers: list[tuple[Callable[[], None], ...]] = [
            (self._give(1.0),),
            (self._give(1.0, is_late=True), self._give(math.nan), self._give(2.0)),
            (self._give(None),),
            (self._give(3.0),),
        ]
        for donations in answers:
            with self.accelerator.accumulate(self.model):
                self.backward()
                for donate in donations:
                    donate()
                self.receiver.inject()
                self.optimizer.step()
                self.optimizer.zero_grad()
                assert self.receiver.commit()
        self._give(4.0)()  # for no step any more

    def _give(self, value: float | None, is_late: bool = False) -> Callable[[], None]:
        """What publishes a gradient, or a skip record, at the newest or at the first weights."""

        def donate() -> None:
            self.first = getattr(self, "first", self.weights_record().header)
            weights = self.first if is_late else None
            if value is None:
                self.donate(None, kind="skip", weights=weights)
            else:
                self.donate(self.constant(value), weights=weights)

        return donate

    def record(self, sequence: int) -> Path:
        return self.receiver.transport.path("donor", sequence)


class Streams:
    """The files of a run in which a donor and a receiver were started."""

    def __init__(self, run_dir: Path, starts: int = 1, signer: Signer = UNSIGNED) -> None:
        self.run_dir = run_dir
        bridge = run_dir / "bridge"
        bridge.mkdir(parents=True)
        self.transport = DirectoryTransport(bridge, signer.of_run("run"))
        terms = to_json({"run_id": "run", "exchange": "gradient"})
        SignedFiles(bridge, signer).create("run.json", terms)
        for job in ("donor", "receiver"):
            self.transport.open_stream(job)
            (bridge / job / "attempts").mkdir()
        self.start("receiver", 1)
        for attempt in range(1, starts + 1):
            self.start("donor", attempt)

    def start(self, job: str, attempt: int, **claim: Any) -> None:
        content = {"heads": ["heads.h2"], "host": "here", "pid": 7, **claim}
        self.transport.small.create(claim_name(job, attempt), to_json(content))

    def publish(self, sequence: int, kind: Kind = "gradient") -> None:
        header = Header(
            kind=kind, run_id="run", job="donor", sequence=sequence, attempt=1, receiver_step=0,
            weights_digest="",
        )  # fmt: skip
        tensors = tensors_of(sequence) if kind == "gradient" else {}
        self.transport.publish(
            "donor",
            sequence,
            lambda path: write_record(path, header, tensors, self.transport.signer),
        )

    def settle(self, attempt: int, *sequences: int) -> None:
        """Record them as applied, one a step."""
        ledger = Ledger(trail_path(self.run_dir, attempt))
        digests = {n: digest_tensors(tensors_of(n)) for n in sequences}
        ledger.note(Entry("donor", n, "applied", n, "", digests[n]) for n in sequences)
        ledger.flush()

    def books(self) -> dict[str, Any]:
        (look,), _ = watch([self.run_dir], 0.01)
        run = look.report()
        (fates,) = run.fates
        return {**dataclasses.asdict(fates), "adds_up": fates.adds_up, "problems": run.problems}
