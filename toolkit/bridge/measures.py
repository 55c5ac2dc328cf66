"""What one injection looks like in numbers, for the tracker."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from toolkit.bridge.accumulation import Window
from toolkit.bridge.payload import Record
from toolkit.parameters import squared_norm


def injection_metrics(
    own: Mapping[str, Tensor],
    window: Window,
    record: Record,
    donor_factor: float,
    backbone: Collection[str],
) -> dict[str, float]:
    """Norms of both parts of a step, their cosine on the backbone, and how the donor's was scaled.

    Args:
        own: the receiver's part by parameter name, unscaled.
        window: the receiver's accumulation window.
        record: the donor's payload.
        donor_factor: what its sum is multiplied by.
        backbone: names of the backbone's parameters.

    Returns:
        Plain floats by tag.
    """
    donor = {name: tensor * donor_factor for name, tensor in record.tensors.items()}
    both = [name for name in backbone if name in own and name in donor]
    dot = math.fsum(
        float(torch.sum(own[name].double().cpu() * donor[name].double())) for name in both
    )
    norms = math.sqrt(
        squared_norm(own[name] for name in both) * squared_norm(donor[name] for name in both)
    )
    header = record.header
    metrics = {
        "gradient/own norm": math.sqrt(squared_norm(own.values())),
        "gradient/donor norm": math.sqrt(squared_norm(donor.values())),
        "rescale/n_r over n_d": window.count / header.count,
        "rescale/donor multiplier": donor_factor,
        "bridge/samples donor (samples)": header.count,
        "bridge/payload (MiB)": record.num_bytes / 2**20,
    }
    if norms:
        metrics["gradient/cosine own donor (backbone)"] = dot / norms
    if header.loss is not None:
        metrics["loss/donor (per sample)"] = header.loss
    return metrics
