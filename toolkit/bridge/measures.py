"""What one injection looks like in numbers, for the tracker."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from toolkit.aggregation import gramian
from toolkit.bridge.accumulation import Window
from toolkit.bridge.control import ControlGroup
from toolkit.bridge.payload import Record
from toolkit.parameters import squared_norm
from toolkit.sharding import is_sharded, local_tensor


def inner_products(
    parameters: Collection[nn.Parameter],
    backbone: Mapping[str, nn.Parameter],
    donor: Mapping[str, Tensor],
    control: ControlGroup,
    own_factor: float,
    donor_factor: float,
) -> tuple[Tensor, tuple[float, float]]:
    """Inner products of ``own_factor`` times ``.grad`` and ``donor_factor`` times ``donor``.

    A collective where parameters are sharded: each rank sums over its parts, one all-reduce adds.

    Args:
        parameters: the model's; a gradient that is None counts as zero.
        backbone: the shared ones of the backbone by name.
        donor: the donor's tensors by name, like the parameters in device and sharding.
        control: the job's control group.
        own_factor: takes the loss scale out of ``.grad``.
        donor_factor: rescales the donor's sum.

    Returns:
        The (2, 2) Gramian on the backbone in float64, and both squared norms on all else.
    """
    shared = {id(parameter) for parameter in backbone.values()}

    def sums(shards: bool) -> list[float]:
        """The Gramian and both norms, over the tensors that are sharded, or over those whole."""
        names = [name for name, p in backbone.items() if is_sharded(p) is shards]
        products = gramian(
            [
                [_part(backbone[name].grad) for name in names],
                [_part(donor.get(name)) for name in names],  # none with scope "head"
            ]
        )
        own = [p.grad for p in parameters if p.grad is not None and id(p) not in shared]
        heads = [tensor for name, tensor in donor.items() if name not in backbone]
        norms = [
            squared_norm(local_tensor(t) for t in tensors if is_sharded(t) is shards)
            for tensors in (own, heads)
        ]
        return [*products.flatten().tolist(), *norms]

    totals = torch.tensor(sums(shards=False), dtype=torch.float64)
    if any(map(is_sharded, parameters)):
        totals += torch.tensor(control.sum(sums(shards=True)), dtype=torch.float64)
    factors = torch.tensor([own_factor, donor_factor], dtype=torch.float64)
    own_norm, donor_norm = totals[4:].tolist()
    return totals[:4].view(2, 2) * torch.outer(factors, factors), (
        own_norm * own_factor**2,
        donor_norm * donor_factor**2,
    )


def _part(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else local_tensor(tensor)


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
