"""Records as jobs write them, and what else can be made of their parts."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from tests.unit.keys import KEY, OTHER_KEY
from toolkit.bridge.authentication import UNSIGNED, Signer
from toolkit.bridge.digests import digest_tensors
from toolkit.bridge.payload import Header, write_record

RUN, JOB, SEQUENCE = "run", "donor", 3
EXPECTED = {"a": torch.zeros(64, 32), "b": torch.zeros(33, dtype=torch.float64)}
# What a job that shares these tensors expects at most (`BridgeJob._record_bytes`).
LIMIT = 8 * sum(t.numel() for t in EXPECTED.values()) + 1024 * len(EXPECTED) + 2**20
HUGE = [2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**400]


def header(sequence: int = SEQUENCE, **changes: Any) -> Header:
    plain = Header(
        kind="gradient", run_id=RUN, job=JOB, sequence=sequence, attempt=1, receiver_step=sequence,
        weights_digest=f"weights-{sequence}", head="heads.h2", donor_step=sequence, count=5.0,
        loss=0.25,
    )  # fmt: skip
    return dataclasses.replace(plain, **changes)


def tensors(sequence: int = SEQUENCE) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(sequence)
    return {
        name: torch.randn(like.shape, generator=generator, dtype=like.dtype)
        for name, like in EXPECTED.items()
    }


def record(
    directory: Path,
    signer: Signer,
    sequence: int = SEQUENCE,
    seed: int | None = None,
    **changes: Any,
) -> bytes:
    """The bytes that a job writes."""
    path = directory / "written"
    content = tensors(sequence if seed is None else seed)
    write_record(path, header(sequence, **changes), content, signer)
    data = path.read_bytes()
    path.unlink()
    return data


def craft(
    content: dict[str, Tensor], signer: Signer, *, without: str = "", **changes: Any
) -> bytes:
    """A file of these tensors whose digests fit, with header fields of any type and value."""
    fields = dataclasses.asdict(header()) | {"tensors_digest": digest_tensors(content)} | changes
    fields.pop(without, None)
    return save(content, metadata=seal(json.dumps(fields), signer))


def seal(text: str, signer: Signer = UNSIGNED) -> dict[str, str]:
    """The metadata of a file whose header has this text."""
    if signer.has_key:
        proof = {"hmac_sha256": signer.sign("record", text.encode())}
    else:
        proof = {"digest": hashlib.sha256(text.encode()).hexdigest()}
    return {"gradient_bridge": text, **proof}


def split(data: bytes) -> tuple[bytes, bytes]:
    """The JSON header of a safetensors file, and its data."""
    end = 8 + int.from_bytes(data[:8], "little")
    return data[8:end], data[end:]


def join(text: bytes, body: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text + body


Change = Callable[["Originals", random.Random], bytes]


class Originals:
    """What lies in the directories of two runs, and what mutants are made of."""

    def __init__(self, directory: Path, signer: Signer) -> None:
        self.signer = signer
        self.data = record(directory, signer)
        self.neighbours = [record(directory, signer, SEQUENCE + step) for step in (-1, 1)]
        other = Signer(KEY, "another run") if signer.has_key else UNSIGNED
        self.alien = record(directory, other, seed=100, run_id="another run")

    def craft(self, rng: random.Random, content: dict[str, Tensor], **changes: Any) -> bytes:
        """Crafted by who has no key of this run, or any key where there is none."""
        forgers = [UNSIGNED, Signer(OTHER_KEY, RUN), Signer(KEY, "another run")]
        signer = rng.choice(forgers) if self.signer.has_key else UNSIGNED
        return craft(content, signer, **changes)
