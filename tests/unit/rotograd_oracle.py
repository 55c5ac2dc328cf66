"""RotoGrad as its equations say it: plain autograd, a backward of its own for each task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from toolkit.rotograd import RotateOnly, RotoGrad, RotoGradNorm
from toolkit.rotograd.rotations import unpack

Losses = Callable[[Sequence[Tensor]], Sequence[Tensor | None]]
IN, SIZE = 5, 6


def backbone() -> nn.Module:
    return nn.Sequential(nn.Linear(IN, 8), nn.Tanh(), nn.Linear(8, SIZE))


def heads(num_tasks: int) -> list[nn.Module]:
    return [nn.Sequential(nn.Linear(SIZE, 4), nn.Tanh(), nn.Linear(4, 1)) for _ in range(num_tasks)]


def build(
    kind: type[RotateOnly] = RotoGrad,
    num_tasks: int = 3,
    *,
    init: Literal["identity", "random"] = "random",
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> Any:
    """A small model with non-trivial rotations, always the same."""
    torch.manual_seed(0)
    model = kind(backbone(), heads(num_tasks), SIZE, init=init, **options).to(dtype).train()
    model.rotations.fold()  # as orthogonal as this precision allows
    return model


def data(step: int, size: int = 16, dtype: torch.dtype = torch.float64) -> Tensor:
    random = torch.Generator().manual_seed(step)
    return torch.randn(size, IN, generator=random, dtype=torch.float64).to(dtype)


def losses_of(predictions: Sequence[Tensor], inputs: Tensor) -> list[Tensor]:
    """Positive losses of unlike sizes."""
    return [
        10.0 ** (k - 1)
        * F.mse_loss(one[:, 0], (torch.sin((k + 1) * inputs[:, k]) + k).to(one.dtype))
        for k, one in enumerate(predictions)
    ]


def gradients_of(model: nn.Module) -> dict[str, Tensor | None]:
    """By parameter name; for the rotations as matrices with a strictly lower triangle."""
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    packed = grads["rotations.tangents"]
    if packed is not None:
        grads["rotations.tangents"] = unpack(packed).tril(-1)
    return grads


def exponential(matrix: Tensor, tangent: Tensor) -> Tensor:
    lower = tangent.tril(-1)
    return matrix @ torch.linalg.matrix_exp(lower - lower.mT)


class Oracle:
    """Remembers first norms and losses as the model does; gives the gradients of one step."""

    def __init__(self, model: Any) -> None:
        self.model, self.step = model, 0
        self.norms: dict[int, Tensor] = {}
        self.losses: dict[int, Tensor] = {}

    def gradients(self, inputs: Tensor, losses: Losses) -> dict[str, Tensor | None]:
        """By parameter name, what ``.grad`` must be; one optimizer step follows."""
        model, rotations = self.model, self.model.rotations.matrices
        size = rotations.shape[-1]
        z = model.backbone(inputs)
        seen = []
        for matrix in rotations:
            free = z.detach().requires_grad_()
            rotated = torch.cat([free[:, :size] @ matrix.T, free[:, size:]], 1)
            rotated.retain_grad()
            seen.append((free, rotated))
        values = losses([h(r) for h, (_, r) in zip(model.heads, seen, strict=True)])
        tasks = [k for k, loss in enumerate(values) if loss is not None]
        grads: dict[str, Tensor | None] = dict.fromkeys(dict(model.named_parameters()))
        norms, at_z, at_r = {}, {}, {}
        for k in tasks:
            loss, (free, rotated) = values[k], seen[k]
            assert loss is not None
            named = dict(model.heads[k].named_parameters())
            found = torch.autograd.grad(loss, [free, rotated, *named.values()], retain_graph=True)
            at_z[k], at_r[k], *own = found
            grads |= {f"heads.{k}.{n}": g for n, g in zip(named, own, strict=True)}
            norms[k] = at_z[k].norm()
            if self.step == model.burn_in_period or k not in self.norms:
                self.norms[k], self.losses[k] = norms[k], loss.detach()
        weights = self._weights(tasks, norms, at_z, values, grads)
        z_grad = torch.stack([weights[k] * at_z[k] for k in tasks]).sum(0)
        named = dict(model.backbone.named_parameters())
        own = list(torch.autograd.grad(z, list(named.values()), z_grad))
        grads |= {f"backbone.{n}": g for n, g in zip(named, own, strict=True)}
        sigma = {k: norms[k] / len(z) ** 0.5 for k in tasks}
        mean = sum(at_z[k] / sigma[k] for k in tasks) / len(tasks)
        tangents = torch.zeros_like(rotations).requires_grad_()
        objective = torch.zeros(())
        for k in tasks:
            turned = mean[:, :size] @ exponential(rotations[k], tangents[k]).T
            objective = objective - (turned * at_r[k][:, :size]).sum()
        (alignment,) = torch.autograd.grad(objective, tangents)
        if model.coop_enabled:
            mean_norm = torch.stack([at_z[k] for k in tasks]).mean(0).norm()
            alignment = self._cooperate(mean, mean_norm, z.detach(), at_r)
        grads["rotations.tangents"] = alignment
        self.step += 1
        return grads

    def _weights(
        self,
        tasks: list[int],
        norms: dict[int, Tensor],
        at_z: dict[int, Tensor],
        values: Sequence[Tensor | None],
        grads: dict[str, Tensor | None],
    ) -> dict[int, Tensor]:
        model = self.model
        if type(model) is RotoGrad:
            ratios = {k: norms[k] / self.norms[k] for k in tasks}
            length = sum(ratios[k] / sum(ratios.values()) * norms[k] for k in tasks)
            return {k: length / norms[k] for k in tasks}
        if type(model) is RotoGradNorm:
            weights = len(model) * torch.softmax(model.raw_weights, 0)
            fixed = weights.detach()
            total = torch.stack([fixed[k] * at_z[k] for k in tasks]).mean(0).norm()
            rate = {k: values[k].detach() / self.losses[k] for k in tasks}  # type: ignore[union-attr]
            mean = sum(rate.values()) / len(tasks)
            objective = sum(
                (weights[k] * norms[k] - total * (rate[k] / mean) ** model.alpha).abs()
                for k in tasks
            )
            assert isinstance(objective, Tensor)
            (grads["raw_weights"],) = torch.autograd.grad(objective, model.raw_weights)
            return {k: fixed[k] for k in tasks}
        return {k: torch.ones(()) for k in tasks}

    def _cooperate(
        self, mean: Tensor, mean_norm: Tensor, z: Tensor, at_r: dict[int, Tensor]
    ) -> Tensor:
        result: list[Tensor] = []
        root = len(z) ** 0.5
        for k, matrix in enumerate(self.model.rotations.matrices):
            size = len(matrix)
            free = matrix.clone().requires_grad_()
            target = at_r[k][:, :size]
            (own,) = torch.autograd.grad((z[:, :size] @ free.T * target).sum(), free)
            distance = (mean[:, :size] * mean_norm / root @ free.T - target).square().sum()
            (other,) = torch.autograd.grad(distance * root / (2 * mean_norm), free)
            length = ((own + other) / 2).norm()
            tangent = torch.zeros_like(matrix, requires_grad=True)
            combined = length * (own / own.norm() + other / other.norm())
            result += torch.autograd.grad(exponential(matrix, tangent), tangent, combined)
        return torch.stack(result)
