"""How a donor's gradient sum is weighed against the receiver's own.

Everything here is arithmetic on two sums: ``S_r``, the receiver's sum over its samples of the
per-sample gradient, and ``S``, the donor's. One optimizer step uses

    own_factor * S_r + donor_factor * S

and a rule says which factors make that step equal to one step of which joint training.
"""

from __future__ import annotations

import math
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
    num_donor: float,
    donor_weight: float = 1.0,
) -> tuple[float, float]:
    """The factors of the receiver's own and of the donor's gradient sum.

    With ``n_r = num_own``, ``n_d = num_donor`` and ``lambda = donor_weight``:

    ========== ============================== ============================ =====================
    rule       mean loss                      sum loss                     one joint step on
    ========== ============================== ============================ =====================
    ``match``  ``S_r/n_r + lambda S/n_d``     ``S_r + lambda S n_r/n_d``   mean l1 + lambda mean
                                                                           l2 (n_r times it)
    ``append`` ``(S_r + lambda S)/n_r``       ``S_r + lambda S``           the donor's samples
                                                                           added to the batch
    ``pool``   ``(S_r + lambda S)/(n_r+n_d)`` refused                      the mean of the union
    ========== ============================== ============================ =====================

    A side with no samples is absent: its factor is 0. (Its sum is zero; the other side's factor
    is what it would be, where that is defined.)

    Args:
        rule: one of ``match``, ``append``, ``pool``.
        loss_reduction: what the step uses: ``mean`` or ``sum`` over the global batch.
        num_own: the receiver's samples in this step, over ranks and micro-steps; not negative.
        num_donor: the payload's samples; not negative.
        donor_weight: lambda, the weight of the donor's loss in the joint loss.

    Returns:
        ``(own_factor, donor_factor)``.

    Raises:
        ValueError: for unknown or contradictory settings, a negative or non-finite count, and for
            ``append`` on means where the receiver has no samples to be appended to.
    """
    check_rule(rule, loss_reduction)
    for name, value in (("num_own", num_own), ("num_donor", num_donor)):
        if not math.isfinite(value) or value < 0:
            raise ValueError(f"{name} must be finite and not negative, got {value!r}")
    if loss_reduction == "sum":
        own_factor = 1.0 if num_own else 0.0
        if not num_donor:
            return own_factor, 0.0
        return own_factor, donor_weight * (num_own / num_donor if rule == "match" else 1.0)
    if rule == "match":
        own_factor = 1.0 / num_own if num_own else 0.0
        return own_factor, donor_weight / num_donor if num_donor else 0.0
    if rule == "append" and num_donor and not num_own:
        raise ValueError(
            "rescale rule 'append' divides by the receiver's number of samples, which is 0 in this "
            "step; use 'match' or 'pool' where a step of the receiver may have no samples"
        )
    total = num_own if rule == "append" else num_own + num_donor
    own_factor = 1.0 / total if num_own else 0.0
    return own_factor, donor_weight / total if num_donor else 0.0
