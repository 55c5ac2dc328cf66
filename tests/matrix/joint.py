"""The oracle: joint training of a setting in one process, every factor written out by hand."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.matrix.setting import (
    EMA_DECAY,
    FROZEN,
    HEAD,
    INIT_SCALE,
    MAX_GRAD_NORM,
    NO_LABEL,
    Network,
    Setting,
    Silo,
    build_network,
    build_optimizer,
    epoch_batches,
    fixed_batch_size,
    learning_rate_factor,
)
from toolkit.bridge.config import Role

Pair = tuple[int, int | None]  # the receiver's window of a step, and the donor's (None: no part)
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


def windows(setting: Setting, role: Role) -> Iterator[list[int]]:
    """The samples of every accumulation window of one job, over its ranks and micro-steps."""
    ranks = setting.side(role).ranks
    streams = [_windows_of_rank(setting, role, rank) for rank in range(ranks)]
    while True:
        yield list(itertools.chain(*(next(stream) for stream in streams)))


def _windows_of_rank(setting: Setting, role: Role, rank: int) -> Iterator[list[int]]:
    side = setting.side(role)
    for epoch in itertools.count():
        batches = epoch_batches(setting, role, epoch)
        if side.batches == "padded":  # filled up from the start of the epoch
            order, size = list(itertools.chain(*batches)), fixed_batch_size(setting, role)
            missing = -len(order) % (size * side.ranks)
            order += order[:missing]
            batches = [order[start : start + size] for start in range(0, len(order), size)]
        mine = batches[rank :: side.ranks]
        for start in range(0, len(mine), side.accumulation):
            yield list(itertools.chain(*mine[start : start + side.accumulation]))


def count(setting: Setting, silo: Silo, indices: Sequence[int]) -> float:
    """Samples, tokens or the sum of weights."""
    if setting.unit == "tokens":
        return sum(int(label != NO_LABEL) for i in indices for label in silo.labels[i])
    if setting.unit == "weights":
        return sum(float(silo.weights[i]) for i in indices)
    return float(len(indices))


def gradient_sum(
    setting: Setting, role: Role, model: Network, silo: Silo, indices: list[int], splits: int
) -> dict[str, Tensor]:
    """Sum over ``indices`` of the gradient of each sample's loss, by name.

    Parts are divided by their number, as accumulated micro-batches are: low precision rounds the
    gradient of the logits, and otherwise if they are divided by three.
    """
    precision = setting.side(role).precision
    scale = (INIT_SCALE if precision == "fp16" else 1.0) / splits
    parameters = {
        name: p
        for name, p in model.named_parameters()
        if name.startswith(("backbone.", f"heads.{HEAD[role]}."))
    }
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for part in range(splits):
        batch = silo.collate(indices[part::splits])
        if not len(batch["keys"]):
            continue
        with torch.autocast("cpu", PRECISIONS.get(precision), enabled=precision in PRECISIONS):
            logits = model(batch["features"], batch["keys"], HEAD[role])
        logits = logits.to(getattr(torch, setting.dtype))
        losses = F.cross_entropy(
            logits.flatten(0, 1), batch["labels"].flatten(), reduction="none", ignore_index=NO_LABEL
        )
        loss = (losses.view_as(batch["labels"]).sum(dim=1) * batch["weights"]).sum()
        grads = torch.autograd.grad(loss * scale, list(parameters.values()))
        for name, grad in zip(parameters, grads, strict=True):
            total[name] += grad / scale
    return total


def factors(setting: Setting, n_r: float, n_d: float) -> tuple[float, float]:
    """What both sums are multiplied by, by the README's table; n = 0: the part is absent."""
    lam = setting.donor_weight
    match setting.rescale, setting.loss_reduction:
        case "match", "mean":
            own, donor = (1 / n_r if n_r else 0.0), (lam / n_d if n_d else 0.0)
        case "match", "sum":
            own, donor = 1.0, (lam * n_r / n_d if n_d else 0.0)
        case "append", "mean":
            own, donor = 1 / n_r, lam / n_r
        case "append", "sum":
            own, donor = 1.0, lam
        case _:
            own, donor = 1 / (n_r + n_d), lam / (n_r + n_d)
    return own, donor


def train_jointly(
    setting: Setting, pairs: Sequence[Pair], splits: int = 1, stream_seed: int | None = None
) -> dict[str, Tensor]:
    """Final weights (and their moving average, under ``ema.``) of training on both silos.

    Args:
        setting: the case.
        pairs: the windows of both jobs that each step takes.
        splits: parts that every batch is split into, for the noise floor.
        stream_seed: of Dropout's random stream, where another one is wanted.
    """
    model = build_network(setting)
    if stream_seed is not None:
        torch.manual_seed(stream_seed)
    optimizer = build_optimizer(setting, model, form="plain")
    base_lr = optimizer.param_groups[0]["lr"]
    roles: tuple[Role, Role] = ("receiver", "donor")
    silos = {role: Silo(setting, role) for role in roles}
    taken = {
        role: list(itertools.islice(windows(setting, role), 1 + max(p[i] or 0 for p in pairs)))
        for i, role in enumerate(roles)
    }
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step, (own_window, donor_window) in enumerate(pairs):
        own = taken["receiver"][own_window]
        donor = [] if donor_window is None else taken["donor"][donor_window]
        n_r, n_d = (
            count(setting, silos[role], indices)
            for role, indices in zip(roles, (own, donor), strict=True)
        )
        own_factor, donor_factor = factors(setting, n_r, n_d)
        grads = _scaled(
            gradient_sum(setting, "receiver", model, silos["receiver"], own, splits), own_factor
        )
        if donor:
            part = gradient_sum(setting, "donor", model, silos["donor"], donor, splits)
            for name, grad in _scaled(part, donor_factor).items():
                crosses = setting.scope == "all" or name.startswith("heads.h2.")
                if crosses and not (setting.frozen == "donor" and name == FROZEN):
                    grads[name] = grads[name] + grad if name in grads else grad
        if setting.frozen in ("receiver", "both"):
            del grads[FROZEN]
        if setting.clip:
            norm = torch.stack([grad.norm() for grad in grads.values()]).norm()
            grads = _scaled(grads, min(1.0, MAX_GRAD_NORM / (float(norm) + 1e-6)))
        for name, parameter in model.named_parameters():
            parameter.grad = grads.get(name)
        optimizer.param_groups[0]["lr"] = base_lr * learning_rate_factor(setting, step)
        optimizer.step()
        for name, parameter in model.named_parameters():
            average[name] = EMA_DECAY * average[name] + (1 - EMA_DECAY) * parameter.detach()
    return with_average(model, average if setting.ema else {})


def _scaled(grads: dict[str, Tensor], factor: float) -> dict[str, Tensor]:
    return {name: grad * factor for name, grad in grads.items()}


def with_average(model: nn.Module, average: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights and statistics by name, and the weights' moving average."""
    buffers = [(name, b) for name, b in model.named_buffers() if b.is_floating_point()]
    tensors = [*model.named_parameters(), *buffers]
    weights = {name: tensor.detach().clone() for name, tensor in tensors}
    return weights | {f"ema.{name}": tensor for name, tensor in average.items()}
