"""What one injection looks like in numbers, for the tracker."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from toolkit.aggregation import gramian
from toolkit.bridge.accumulation import Window
from toolkit.bridge.payload import Record
from toolkit.parameters import squared_norm


def inner_products(
    model: nn.Module,
    backbone: Mapping[str, nn.Parameter],
    donor: Mapping[str, Tensor],
    own_factor: float,
    donor_factor: float,
) -> tuple[Tensor, tuple[float, float]]:
    """Inner products of ``own_factor`` times ``.grad`` and ``donor_factor`` times ``donor``.

    Args:
        model: the unwrapped model; a gradient that is None counts as zero.
        backbone: its shared parameters by name.
        donor: the donor's tensors by name, on the parameters' devices.
        own_factor: takes the loss scale out of ``.grad``.
        donor_factor: rescales the donor's sum.

    Returns:
        The (2, 2) Gramian on the backbone in float64, and both squared norms on all else.
    """
    products = gramian(
        [
            [parameter.grad for parameter in backbone.values()],
            [donor.get(name) for name in backbone],  # none with scope "head"
        ]
    )
    factors = torch.tensor([own_factor, donor_factor], dtype=torch.float64)
    shared = {id(parameter) for parameter in backbone.values()}
    own = (p.grad for p in model.parameters() if p.grad is not None and id(p) not in shared)
    heads = (tensor for name, tensor in donor.items() if name not in backbone)
    return products * torch.outer(factors, factors), (
        squared_norm(own) * own_factor**2,
        squared_norm(heads) * donor_factor**2,
    )


def injection_metrics(
    backbone: Tensor,
    heads: tuple[float, float],
    window: Window,
    record: Record,
    donor_factor: float,
) -> dict[str, float]:
    """Norms of both parts of a step, their cosine on the backbone, and how the donor's was scaled.

    Args:
        backbone: (2, 2) inner products on the backbone of the receiver's part and the donor's,
            rescaled, without a loss scale.
        heads: squared norms of both parts elsewhere, likewise.
        window: the receiver's accumulation window.
        record: the donor's payload.
        donor_factor: what its sum is multiplied by.

    Returns:
        Plain floats by tag.
    """
    (gg, gd), (_, dd) = backbone.tolist()
    header = record.header
    metrics = {
        "gradient/own norm": math.sqrt(gg + heads[0]),
        "gradient/donor norm": math.sqrt(dd + heads[1]),
        "rescale/n_r over n_d": window.count / header.count,
        "rescale/donor multiplier": donor_factor,
        "bridge/samples donor (samples)": header.count,
        "bridge/payload (MiB)": record.num_bytes / 2**20,
    }
    if norms := math.sqrt(gg) * math.sqrt(dd):
        metrics["gradient/cosine own donor (backbone)"] = gd / norms
    if header.loss is not None:
        metrics["loss/donor (per sample)"] = header.loss
    return metrics


def aggregation_metrics(backbone: Tensor, weights: tuple[float, float]) -> dict[str, float]:
    """What a rule for conflicts saw, and the weights that it gave.

    Args:
        backbone: as in :func:`injection_metrics`.
        weights: of the receiver's part and of the donor's, on the backbone.
    """
    own, donor = backbone.diagonal().sqrt().tolist()
    return {
        "aggregate/own weight": weights[0],
        "aggregate/donor weight": weights[1],
        "aggregate/own norm (backbone)": own,
        "aggregate/donor norm (backbone)": donor,
    }
