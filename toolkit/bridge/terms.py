"""What a job must have like the others of its run, and what it says of itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from toolkit.bridge.compression import compressed_bytes
from toolkit.bridge.config import BridgeConfig
from toolkit.parameters import SharedParameters

_HEADER_ALLOWANCE_BYTES = 2**20


def terms_of(
    config: BridgeConfig, shared: SharedParameters, resting: Mapping[str, str]
) -> dict[str, Any]:
    """What all jobs of a run must have alike; fit for JSON.

    Args:
        config: the settings.
        shared: the tensors.
        resting: by name, the digest of each parameter that does not cross.

    Raises:
        ValueError: if the settings have class names for a head that is not shared.
    """
    return {
        "schemas": _schemas(config, shared, resting),
        "exchange": config.exchange,
        "local_steps": config.local_steps if config.exchange == "delta" else None,
        "scope": config.scope,
        "unit": config.unit,
        "class_names": _class_names(config, shared),
    }


def claim_of(
    config: BridgeConfig,
    shared: SharedParameters,
    payloads_like: Mapping[str, Mapping[str, Tensor]],
) -> dict[str, Any]:
    """What a job says of itself; fit for JSON.

    Args:
        config: the settings.
        shared: the tensors.
        payloads_like: by head, what the tensors of a payload are like.
    """
    tensors = (tensor for like in payloads_like.values() for tensor in like.values())
    # No teacher is kept for a checkpoint.
    interval = None if config.exchange == "distill" else config.checkpoint_interval
    return {
        "record_bytes": record_bytes(shared),
        "writes_behind": config.writes_behind,
        "compression": config.compression,
        "payload_budget_files": config.payload_budget_files,
        "payload_budget_gib": config.payload_budget_gib,
        "payload_bytes": compressed_bytes(tensors, config.compression, config.topk_ratio),
        "checkpoint_interval": interval,
        "checkpoints_kept": config.checkpoints_kept,
    }


def record_bytes(shared: SharedParameters) -> int:
    """The size of a record of all that a job shares, at most."""
    # A gradient may be wider than its parameter, at most 8 bytes an element.
    elements = sum(tensor.numel() for tensor in shared.weights.values())
    return 8 * elements + 1024 * len(shared.weights) + _HEADER_ALLOWANCE_BYTES


def _schemas(
    config: BridgeConfig, shared: SharedParameters, resting: Mapping[str, str]
) -> dict[str, dict[str, list[Any]]]:
    """The tensors, or in exchange ``distill`` the heads by name only.

    A teacher may have another shape; whether the receiver can run it shows where it is read.
    """
    schemas = shared.schemas()
    if config.exchange == "distill":
        return {part: {} for part in schemas}
    for name, digest in resting.items():
        schemas["backbone"][name].append(digest)
    return schemas


def _class_names(config: BridgeConfig, shared: SharedParameters) -> dict[str, list[str]]:
    stated = config.class_names
    if unknown := sorted(set(stated) - set(shared.heads)):
        raise ValueError(
            f"class_names has {unknown[0]!r}, which this job does not share; it shares "
            f"{', '.join(shared.heads)}"
        )
    return {head: list(names) for head, names in stated.items()}
