"""A record with two tensors, and the file that holds it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from toolkit.bridge.payload import Header, write_record

HEADER = Header(
    kind="gradient", run_id="run", job="donor", sequence=3, attempt=1, receiver_step=7,
    weights_digest="abc", donor_step=4, count=5.0, loss=0.25,
)  # fmt: skip


def tensors() -> dict[str, Tensor]:
    """Of two types."""
    return {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3, dtype=torch.float64) / 3}


def written(
    tmp_path: Path, header: Header = HEADER, content: dict[str, Tensor] | None = None
) -> Path:
    """The file of a record."""
    path = tmp_path / "record.safetensors"
    write_record(path, header, tensors() if content is None else content)
    return path
