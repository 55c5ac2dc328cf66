"""Several gradients of the same parameters made into one, by weights that their Gramian decides.

Where gradients conflict (a negative inner product), their sum may climb the loss of one. The rules
here need inner products only: the Gramian ``G[i, j] = <g_i, g_j>`` of K gradients goes in, K
weights come out, and the step's gradient is ``sum_i w_i g_i``. So no gradient is copied into a
K x P matrix.

=========== ========================================================= ==========================
rule        the step's gradient                                       without conflict
=========== ========================================================= ==========================
``sum``     the sum                                                   the sum
``pcgrad``  each projected off those it conflicts with, then summed   the sum
``upgrad``  each projected onto the cone that conflicts with none,    the mean: the sum / K
            then averaged
``mgda``    the shortest convex combination                           a convex combination
``protect`` each other one projected off the first, then summed       the sum
=========== ========================================================= ==========================

``torchjd:NAME`` is a weighting of the package of that name, see ``aggregation_torchjd``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from toolkit.aggregation_torchjd import PREFIX, TORCHJD_WEIGHTINGS, torchjd_weights
from toolkit.inner_products import inner_products

Rule = Callable[[Tensor], Tensor]


def gramian(gradients: Sequence[Sequence[Tensor | None]]) -> Tensor:
    """Inner products of K gradients.

    Args:
        gradients: K lists of tensors, alike in number and shapes, each tensor on the same device
            as its counterparts; None stands for zeros.

    Returns:
        (K, K) float64, on the CPU.
    """
    pairs = list(itertools.combinations_with_replacement(range(len(gradients)), 2))
    total = torch.zeros(len(pairs), dtype=torch.float64)
    for tensors in zip(*gradients, strict=True):
        present = {index: tensor for index, tensor in enumerate(tensors) if tensor is not None}
        if not present:
            continue
        place = {index: number for number, index in enumerate(present)}
        known = [number for number, (i, j) in enumerate(pairs) if i in place and j in place]
        products = inner_products(
            list(present.values()),
            [(place[pairs[number][0]], place[pairs[number][1]]) for number in known],
        )
        total = total.to(products.device)
        total[known] += products
    result = torch.zeros(len(gradients), len(gradients), dtype=torch.float64)
    for (i, j), product in zip(pairs, total.tolist(), strict=True):
        result[i, j] = result[j, i] = product
    return result


def find_rule(name: str) -> Rule:
    """The rule of this name.

    Raises:
        ValueError: for an unknown name, listing those that there are, and for a ``torchjd`` one
            that lacks a package, naming it.
    """
    if name.startswith(PREFIX):
        return torchjd_weights(name.removeprefix(PREFIX))
    if name not in RULES:
        raise ValueError(
            f"aggregate {name!r} is unknown; choose one of {list(RULES)} or "
            f"'{PREFIX}NAME' with one of {list(TORCHJD_WEIGHTINGS)}"
        )
    return RULES[name]


def guarded_weights(rule: Rule, gramian: Tensor) -> Tensor:
    """The weights of a rule; 1 where it has nothing to say.

    A gradient of norm zero is left out, as if its task were absent, and the rule sees the others;
    a single one that is left is taken as it is. Where an inner product or a weight is not finite,
    all weights are 1: the sum then shows what is wrong (a loss scaler skips that step).

    Args:
        rule: what :func:`find_rule` returns.
        gramian: (K, K) inner products.

    Returns:
        (K,) finite weights, float64.
    """
    gramian = gramian.double()
    weights = torch.ones(len(gramian), dtype=torch.float64)
    present = gramian.diagonal() > 0
    if int(present.sum()) < 2 or not bool(gramian.isfinite().all()):
        return weights
    found = rule(gramian[present][:, present])
    if bool(found.isfinite().all()):
        weights[present] = found.double()
    return weights


def sum_weights(gramian: Tensor) -> Tensor:
    """Weights of the plain sum: ones."""
    return torch.ones(len(gramian), dtype=torch.float64)


def pcgrad_weights(gramian: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """PCGrad: every gradient is projected off each that it conflicts with, one after the other.

    Of two it is ``(1 - gd/gg, 1 - gd/dd)`` where ``gd < 0``. From three on the order matters, and
    is drawn anew for every gradient, as in the paper.

    Reference: Yu et al., Gradient Surgery for Multi-Task Learning, NeurIPS 2020, arXiv 2001.06782.

    Args:
        gramian: (K, K) inner products, finite.
        generator: draws the orders; by default torch's own for the CPU.

    Returns:
        (K,) weights, float64.
    """
    products: list[list[float]] = gramian.tolist()
    size = len(products)
    total = [0.0] * size
    for i in range(size):
        others = [j for j in range(size) if j != i]
        if size > 2:
            others = [others[k] for k in torch.randperm(size - 1, generator=generator).tolist()]
        combination = [float(j == i) for j in range(size)]
        for j in others:
            dot = sum(p * c for p, c in zip(products[j], combination, strict=True))
            if dot < 0 < products[j][j]:
                combination[j] -= dot / products[j][j]
        total = [t + c for t, c in zip(total, combination, strict=True)]
    return torch.tensor(total, dtype=torch.float64)


def upgrad_weights(gramian: Tensor) -> Tensor:
    """UPGrad: the mean of the gradients, each projected onto the cone that conflicts with none.

    The mean, as in the paper: of gradients without conflict it is their sum divided by K. Of two it
    is half of PCGrad. From three on, each projection is a least squares problem with non-negative
    unknowns, of gradients divided by their norms, so that a short one counts no less.

    Reference: Quinton and Rey, Jacobian Descent for Multi-Objective Optimization, 2024,
    arXiv 2406.16232.

    Args:
        gramian: (K, K) inner products, finite, with a positive diagonal.

    Returns:
        (K,) weights, float64.
    """
    size = len(gramian)
    if size == 2:
        return pcgrad_weights(gramian) / 2
    norms = gramian.diagonal().double().sqrt()
    root = _root(gramian.double() / torch.outer(norms, norms))
    total = norms.clone()
    for i in range(size):
        total += norms[i] * _non_negative_least_squares(root, -root[:, i])
    return total / norms / size


def mgda_weights(gramian: Tensor) -> Tensor:
    """MGDA: the convex combination of least norm; its product with every gradient is at least that.

    A gradient that is much shorter than the others gets most of the weight.

    References: Désidéri, Multiple-gradient descent algorithm (MGDA) for multiobjective
    optimization, 2012; Sener and Koltun, Multi-Task Learning as Multi-Objective Optimization,
    NeurIPS 2018, arXiv 1810.04650.

    Args:
        gramian: (K, K) inner products, finite, with a positive diagonal.

    Returns:
        (K,) weights that are not negative and add up to 1, float64.
    """
    if len(gramian) == 2:
        (gg, gd), (_, dd) = gramian.tolist()
        distance = gg + dd - 2 * gd
        own = min(max((dd - gd) / distance, 0.0), 1.0) if distance > 0 else 0.5
        return torch.tensor([own, 1 - own], dtype=torch.float64)
    # The v >= 0 that minimises |sum v_i g_i|^2 + (sum v_i - 1)^2 is a multiple of the solution:
    # for v = t a with a convex, the best t leaves n / (1 + n) with n = |sum a_i g_i|^2.
    root = _root(gramian.double() / gramian.diagonal().mean())
    rows = torch.cat([root, torch.ones(1, len(gramian), dtype=torch.float64)])
    target = torch.zeros(len(rows), dtype=torch.float64)
    target[-1] = 1.0
    solution = _non_negative_least_squares(rows, target)
    return solution / solution.sum()


def protect_weights(gramian: Tensor) -> Tensor:
    """The first gradient, plus each other one projected off it where the two conflict.

    The first is never touched, so a step is worth to its loss, to first order, what it is worth
    without the others, or more. The projection is that of A-GEM, which has the gradient on old
    tasks in the first one's place and keeps the projected gradient only.

    References: Lopez-Paz and Ranzato, Gradient Episodic Memory for Continual Learning, NeurIPS
    2017, arXiv 1706.08840; Chaudhry et al., Efficient Lifelong Learning with A-GEM, ICLR 2019,
    arXiv 1812.00420.

    Args:
        gramian: (K, K) inner products, finite; the first gradient is the protected one.

    Returns:
        (K,) weights, float64.
    """
    weights = torch.ones(len(gramian), dtype=torch.float64)
    gg, *others = gramian[0].tolist()
    if gg > 0:
        weights[0] -= sum(gd / gg for gd in others if gd < 0)
    return weights


def _root(gramian: Tensor) -> Tensor:
    """A square matrix S with ``S^T S = gramian``; its columns are the gradients, rotated."""
    values, vectors = torch.linalg.eigh(gramian)
    return values.clamp(min=0).sqrt()[:, None] * vectors.T


def _non_negative_least_squares(matrix: Tensor, target: Tensor) -> Tensor:
    """The v >= 0 that minimises ``|matrix v - target|``, by an active set method."""
    from scipy.optimize import nnls  # takes a while, and two gradients do not need it

    return torch.from_numpy(nnls(matrix.numpy(), target.numpy())[0])


RULES: dict[str, Rule] = {
    "sum": sum_weights,
    "pcgrad": pcgrad_weights,
    "upgrad": upgrad_weights,
    "mgda": mgda_weights,
    "protect": protect_weights,
}
