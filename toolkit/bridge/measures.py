"""What one injection looks like in numbers, for the tracker."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from toolkit.aggregation import gramian
from toolkit.bridge.accumulation import Window
from toolkit.bridge.control import ControlGroup
from toolkit.bridge.payload import Record
from toolkit.inner_products import squared_distance, squared_norm
from toolkit.sharding import is_sharded, local_tensor


def inner_products(
    parameters: Collection[nn.Parameter],
    backbone: Mapping[str, nn.Parameter],
    donors: Sequence[Mapping[str, Tensor]],
    control: ControlGroup,
    factors: Sequence[float],
) -> tuple[Tensor, list[float]]:
    """Inner products of ``.grad`` and each donor's tensors, each times its factor.

    A collective where parameters are sharded: each rank sums over its parts, one all-reduce adds.

    Args:
        parameters: the model's; a gradient that is None counts as zero.
        backbone: the shared ones of the backbone by name.
        donors: each donor's tensors by name, like the parameters in device and sharding.
        control: the job's control group.
        factors: of ``.grad`` (which takes the loss scale out of it), then of each donor's sum.

    Returns:
        The (K, K) Gramian on the backbone in float64, the receiver's part first, and K squared
        norms on all else.
    """
    shared = {id(parameter) for parameter in backbone.values()}
    size = len(factors)

    def sums(shards: bool) -> list[float]:
        """The Gramian and the norms, over the tensors that are sharded, or over those whole."""
        names = [name for name, p in backbone.items() if is_sharded(p) is shards]
        own = [_part(backbone[name].grad) for name in names]
        # with scope "head" the donors have nothing for the backbone
        products = gramian([own, *([_part(d.get(name)) for name in names] for d in donors)])
        elsewhere = [[p.grad for p in parameters if p.grad is not None and id(p) not in shared]]
        elsewhere += [[t for name, t in d.items() if name not in backbone] for d in donors]
        norms = [
            squared_norm(local_tensor(t) for t in tensors if is_sharded(t) is shards)
            for tensors in elsewhere
        ]
        return [*products.flatten().tolist(), *norms]

    totals = torch.tensor(sums(shards=False), dtype=torch.float64)
    if any(map(is_sharded, parameters)):
        totals += torch.tensor(control.sum(sums(shards=True)), dtype=torch.float64)
    scale = torch.tensor(factors, dtype=torch.float64)
    products = totals[: size * size].view(size, size) * torch.outer(scale, scale)
    return products, (totals[size * size :] * scale.square()).tolist()


def _part(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else local_tensor(tensor)


def own_metrics(backbone: Tensor, heads: Sequence[float]) -> dict[str, float]:
    """The norm of the receiver's part of a step; arguments as in :func:`donor_metrics`."""
    return {"gradient/own norm": math.sqrt(float(backbone[0, 0]) + heads[0])}


def donor_metrics(
    place: int,
    backbone: Tensor,
    heads: Sequence[float],
    window: Window,
    record: Record,
    donor_factor: float,
) -> dict[str, float]:
    """The norm of one donor's part, its cosine with the receiver's, and how it was scaled.

    Args:
        place: of the donor in the products, from 1.
        backbone: (K, K) inner products on the backbone of the receiver's part and each donor's,
            rescaled, without a loss scale.
        heads: K squared norms of the parts elsewhere, likewise.
        window: the receiver's accumulation window.
        record: the donor's payload.
        donor_factor: what its sum is multiplied by.

    Returns:
        Plain floats by tag, in which the donor has its name.
    """
    header, donor = record.header, record.header.job
    gg, gd, dd = (float(backbone[i, j]) for i, j in ((0, 0), (0, place), (place, place)))
    metrics = {
        f"gradient/{donor} norm": math.sqrt(dd + heads[place]),
        f"gradient/n_r over n_d {donor} (ratio)": window.count / header.count,
        f"gradient/multiplier {donor} (factor)": donor_factor,
        f"bridge/samples {donor} (samples)": header.count,
        f"bridge/payload {donor} (MiB)": record.num_bytes / 2**20,
    }
    if norms := math.sqrt(gg) * math.sqrt(dd):
        metrics[f"gradient/cosine own {donor} (backbone)"] = gd / norms
    if header.loss is not None:
        metrics[f"loss/{donor} (per sample)"] = header.loss
    return metrics | validation_metrics(record)


def validation_metrics(record: Record) -> dict[str, float]:
    """What the donor has measured on its validation data, at the weights of its payload."""
    header = record.header
    return {f"validation/{header.job} {name}": v for name, v in header.validation.items()}


def aggregation_metrics(
    backbone: Tensor, names: Sequence[str], weights: Sequence[float]
) -> dict[str, float]:
    """What a rule for conflicts saw, and the weights that it gave.

    Args:
        backbone: as in :func:`donor_metrics`.
        names: of the parts, ``own`` first.
        weights: of the parts, on the backbone.
    """
    norms = backbone.diagonal().sqrt().tolist()
    metrics = {}
    for name, weight, norm in zip(names, weights, norms, strict=True):
        metrics[f"gradient/{name} weight (factor)"] = weight
        metrics[f"gradient/{name} norm (backbone)"] = norm
    return metrics


def staleness_metrics(
    jobs: Sequence[str],
    ages: Sequence[int],
    weights: Sequence[Mapping[str, tuple[Tensor, Tensor]] | None],
    control: ControlGroup,
) -> dict[str, float]:
    """How old the weights of each donor's payload are. A collective where they are sharded.

    Args:
        jobs: the donors' names.
        ages: in receiver steps.
        weights: those of now and of then, like the parameters in sharding; None where they are not
            known.
        control: the job's control group.
    """
    metrics = {
        f"bridge/staleness {job} (receiver steps)": float(age)
        for job, age in zip(jobs, ages, strict=True)
    }
    known = [
        (job, list(since.values()))
        for job, since in zip(jobs, weights, strict=True)
        if since is not None
    ]

    def squares(shards: bool) -> list[float]:
        return [
            sum(
                squared_distance(local_tensor(now), local_tensor(then))
                for now, then in pairs
                if is_sharded(now) is shards
            )
            for _, pairs in known
        ]

    totals = squares(shards=False)
    if any(is_sharded(now) for _, pairs in known for now, _ in pairs):
        totals = [a + b for a, b in zip(totals, control.sum(squares(shards=True)), strict=True)]
    for (job, _), total in zip(known, totals, strict=True):
        metrics[f"bridge/staleness {job} (norm of weight change)"] = math.sqrt(total)
    return metrics
