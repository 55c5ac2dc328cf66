"""How donors' gradient sums are weighed against the receiver's own.

Everything here is arithmetic on sums: ``S_r``, the receiver's sum over its samples of the
per-sample gradient, and ``S_h``, the sum for each head ``h`` of the donors that train it. One
optimizer step uses

    own_factor * S_r + sum over h of factors[h] * S_h

and a rule says which factors make that step equal to one step of which joint training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, get_args

RescaleRule = Literal["match", "append", "pool"]
LossReduction = Literal["mean", "sum"]

RESCALE_RULES: tuple[RescaleRule, ...] = get_args(RescaleRule)
LOSS_REDUCTIONS: tuple[LossReduction, ...] = get_args(LossReduction)


def check_rule(rule: RescaleRule, loss_reduction: LossReduction) -> None:
    """Refuse an unknown rule or reduction, and ``pool`` with a sum loss.

    Raises:
        ValueError: naming the value and what may stand in its place.
    """
    if rule not in RESCALE_RULES:
        raise ValueError(f"rescale rule {rule!r} is unknown; choose one of {list(RESCALE_RULES)}")
    if loss_reduction not in LOSS_REDUCTIONS:
        raise ValueError(
            f"loss reduction {loss_reduction!r} is unknown; choose one of {list(LOSS_REDUCTIONS)}"
        )
    if rule == "pool" and loss_reduction == "sum":
        raise ValueError(
            "rescale rule 'pool' is a mean over the union of both batches and has no meaning for a "
            "sum loss; use 'append' (the sum over the union) or 'match', or loss reduction 'mean'"
        )


def rescale_factors(
    rule: RescaleRule,
    loss_reduction: LossReduction,
    num_own: float,
    num_donor: Mapping[str, float],
    weights: Mapping[str, float],
) -> tuple[float, dict[str, float]]:
    """The factors of the receiver's own and of the donors' gradient sums.

    With ``n_r = num_own``, and ``n_h = num_donor[h]`` and ``w_h = weights[h]`` for each head:

    ========== ============================== ============================ =====================
    rule       mean loss                      sum loss                     one joint step on
    ========== ============================== ============================ =====================
    ``match``  ``S_r/n_r + sum w_h S_h/n_h``  ``S_r + sum w_h S_h n_r/n_h``  mean l1 + sum of w_h
                                                                           mean l_h (n_r times it)
    ``append`` ``(S_r + sum w_h S_h)/n_r``    ``S_r + sum w_h S_h``        the donors' samples
                                                                           added to the batch
    ``pool``   ``(S_r + sum w_h S_h)``        refused                      the mean of the union
               ``/ (n_r + sum n_h)``
    ========== ============================== ============================ =====================

    A part with no samples is absent: its factor is 0. (Its sum is zero; the other factors are
    what they would be, where that is defined.)

    Args:
        rule: one of ``match``, ``append``, ``pool``.
        loss_reduction: what the step uses: ``mean`` or ``sum`` over the global batch.
        num_own: the receiver's samples in this step, over ranks and micro-steps; not negative.
        num_donor: by head, the samples of all payloads for it; not negative.
        weights: by head, lambda, the weight of its loss in the joint loss.

    Returns:
        The receiver's factor, and by head the donors'.

    Raises:
        ValueError: for unknown or contradictory settings, a negative or non-finite count, and for
            ``append`` on means where the receiver has no samples to be appended to.
    """
    check_rule(rule, loss_reduction)
    counts = {"num_own": num_own, **{f"num_donor[{h!r}]": n for h, n in num_donor.items()}}
    for name, value in counts.items():
        if not math.isfinite(value) or value < 0:
            raise ValueError(f"{name} must be finite and not negative, got {value!r}")
    if rule == "append" and loss_reduction == "mean" and not num_own and any(num_donor.values()):
        raise ValueError(
            "rescale rule 'append' divides by the receiver's number of samples, which is 0 in this "
            "step; use 'match' or 'pool' where a step of the receiver may have no samples"
        )
    union = num_own + sum(num_donor.values())

    def factor(count: float, weight: float) -> float:
        """Of the sum over ``count`` samples."""
        if not count:
            return 0.0
        if loss_reduction == "sum":
            return weight * (num_own / count if rule == "match" else 1.0)
        return weight / {"match": count, "append": num_own, "pool": union}[rule]

    return factor(num_own, 1.0), {h: factor(n, weights[h]) for h, n in num_donor.items()}
