"""Jobs that claim, beat and end as real ones do, without a model."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from toolkit.bridge.authentication import Signer
from toolkit.bridge.config import BridgeConfig, Role
from toolkit.bridge.liveness import Heartbeat
from toolkit.bridge.payload import Header, Kind, write_record
from toolkit.bridge.runs import Attachment, attach
from toolkit.bridge.transport import DirectoryTransport

SCHEMAS = {"backbone": {"w": ["float32", [2, 3]]}, "heads.h2": {"v": ["float32", [3]]}}
TERMS = {
    "schemas": SCHEMAS,
    "exchange": "gradient",
    "local_steps": None,
    "scope": "all",
    "unit": "samples",
}
PEER: dict[Role, Role] = {"donor": "receiver", "receiver": "donor"}
CLAIM = {
    "payload_budget_files": 100,
    "payload_budget_gib": 1.0,
    "payload_bytes": 2**20,
    "checkpoint_interval": None,
    "checkpoints_kept": None,
}


def bridge_of(attachment: Attachment, key: bytes | None = None) -> DirectoryTransport:
    """The transport of a run."""
    return DirectoryTransport(attachment.run_dir / "bridge", Signer(key, attachment.run_id))


class Jobs:
    """Starts jobs in one runs directory."""

    def __init__(self, runs_dir: Path) -> None:
        self.runs_dir = runs_dir
        self.hearts: list[Heartbeat] = []

    def start(
        self,
        role: Role,
        terms: dict[str, Any] | None = None,
        beats: bool = True,
        claim: dict[str, Any] | None = None,
        key: bytes | None = None,
        **settings: Any,
    ) -> Attachment:
        config, signer = BridgeConfig(runs_dir=self.runs_dir, **settings), Signer(key)
        attachment = attach(
            role, config, {**TERMS, **(terms or {})}, {**CLAIM, **(claim or {})}, signer
        )
        transport = bridge_of(attachment, key)
        transport.open_stream(role)
        if beats:
            self.hearts.append(Heartbeat(transport, role))
        return attachment

    def publish(
        self,
        attachment: Attachment,
        role: Role,
        kind: Kind = "end",
        key: bytes | None = None,
    ) -> None:
        transport = bridge_of(attachment, key)
        sequence = max(transport.sequences(role), default=-1) + 1
        header = Header(
            kind=kind, run_id=attachment.run_id, job=role, sequence=sequence, attempt=1,
            receiver_step=0, weights_digest="",
        )  # fmt: skip
        signer = transport.signer
        transport.publish(role, sequence, lambda path: write_record(path, header, {}, signer))

    def leave_weights(self, attachment: Attachment) -> None:
        """As a donor does that has trained by itself."""
        transport = bridge_of(attachment)
        transport.open_stream("donor.weights")
        header = Header(
            kind="weights", run_id=attachment.run_id, job="donor.weights", sequence=0, attempt=1,
            receiver_step=0, weights_digest="",
        )  # fmt: skip
        transport.publish("donor.weights", 0, lambda path: write_record(path, header, {}))

    def kill_all(self) -> None:
        for heart in self.hearts:
            heart.stop()
        self.hearts.clear()

    def claims(self) -> dict[str, Counter[str]]:
        """How many starts of each role every run has."""
        return {
            run.name: Counter(
                path.parent.parent.name for path in run.glob("bridge/*/attempts/*.json")
            )
            for run in sorted(self.runs_dir.iterdir())
        }
