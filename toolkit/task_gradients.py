"""Gradients of several tasks where they meet: one of the backbone for each, weighed by a rule."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from toolkit.aggregation import Rule, gramian, guarded_weights
from toolkit.rotograd import RotateOnly


class ByName(nn.Module):
    """A model that returns a list of predictions, called for them by name as ``MultiHeadModel`` is.

    Args:
        model: prepared or not.
        names: of the tasks, in the order of the list.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, tuple(names)

    def forward(self, images: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """Predictions (N, K) of the tasks ``names`` for images (N, C, H, W)."""
        predictions = dict(zip(self.names, self.model(images), strict=True))
        return {name: predictions[name] for name in names}


class RuleBackward:
    """Backward passes task by task, and a gradient of the backbone that a rule makes of them.

    The heads get the gradients of their own losses. DistributedDataParallel would reduce the sum of
    all tasks' gradients, where the rule needs each of them reduced: call the model and
    :meth:`__call__` under ``accelerator.no_sync(model)``. It reduces K times the backbone's
    parameters, and keeps as much in memory.

    Args:
        accelerator: of the job.
        backbone: whose parameters the tasks share.
        heads: with the remaining parameters.
        rule: from ``find_rule``.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        backbone: nn.Module,
        heads: nn.Module,
        rule: Rule,
    ) -> None:
        self._accelerator, self._rule = accelerator, rule
        self._backbone, self._heads = list(backbone.parameters()), list(heads.parameters())
        self._last: tuple[Tensor, Tensor] | None = None

    def __call__(self, losses: Sequence[Tensor | None], seed: int) -> None:
        """Leave the gradients in ``.grad``, times the loss scale if there is one.

        Args:
            losses: scalars of this rank, whose mean over ranks is a task's loss; None on all ranks
                for a task that this batch has no samples for.
            seed: of the rule's random choices, such as the optimizer's step; alike on all ranks.
        """
        gradients = []
        for index, loss in enumerate(losses):
            if loss is not None:
                self._accelerator.backward(loss, retain_graph=index + 1 < len(losses))
            gradients.append(self._reduced(self._backbone))
            for parameter in self._backbone:
                parameter.grad = None
        for parameter, gradient in zip(self._heads, self._reduced(self._heads), strict=True):
            parameter.grad = gradient
        scaler = self._accelerator.scaler
        products = gramian(gradients) / (1.0 if scaler is None else scaler.get_scale()) ** 2
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            weights = guarded_weights(self._rule, products)
        self._last = products, weights
        for parameter, *parts in zip(self._backbone, *gradients, strict=True):
            there = [(w, g) for w, g in zip(weights.tolist(), parts, strict=True) if g is not None]
            if there:
                parameter.grad = sum(w * g for w, g in there)

    def _reduced(self, parameters: Sequence[nn.Parameter]) -> list[Tensor | None]:
        """Their gradients, the means over ranks; None where there is none."""
        gradients = [parameter.grad for parameter in parameters]
        present = [gradient for gradient in gradients if gradient is not None]
        if self._accelerator.num_processes == 1 or not present:
            return gradients
        flat = torch.cat([gradient.flatten() for gradient in present])
        reduced = self._accelerator.reduce(flat, reduction="mean")
        parts = iter(reduced.split([gradient.numel() for gradient in present]))
        return [
            None if gradient is None else next(parts).view_as(gradient).to(gradient.dtype)
            for gradient in gradients
        ]

    def measures(self) -> dict[str, float]:
        """As ``RotateOnly.measures``, of the gradients of the backbone; empty before the first."""
        if self._last is None:
            return {}
        products, weights = self._last
        norms = products.diagonal().sqrt()
        cosines = (products / torch.outer(norms, norms)).nan_to_num(0.0).tolist()
        result = {f"grad_norm/{k}": norm for k, norm in enumerate(norms.tolist())}
        result |= {f"weight/{k}": weight for k, weight in enumerate(weights.tolist())}
        for j, k in itertools.combinations(range(len(norms)), 2):
            result[f"cosine/{k}_{j}"] = cosines[j][k]
        return result


def conflict_metrics(
    source: RotateOnly | RuleBackward | None, names: Sequence[str]
) -> dict[str, float]:
    """How the tasks' gradients agreed in the last backward, for TensorBoard.

    Args:
        source: what saw them, of the features or of the backbone's parameters; None for nothing.
        names: of the tasks.
    """
    where = "features" if isinstance(source, RotateOnly) else "backbone"
    tags = {
        "grad_norm": f"gradient/{{}} norm ({where})",
        "weight": "gradient/{} weight (factor)",
        "cosine": f"gradient/cosine {{}} ({where})",
        "cosine_before": f"gradient/cosine before rotation {{}} ({where})",
        "orthogonality_error": "gradient/orthogonality error of rotations",
    }
    metrics = {}
    for name, value in (source.measures() if source is not None else {}).items():
        kind, _, tasks = name.partition("/")
        numbers = sorted(int(number) for number in tasks.split("_") if number)
        metrics[tags[kind].format(" ".join(names[number] for number in numbers))] = value
    return metrics
