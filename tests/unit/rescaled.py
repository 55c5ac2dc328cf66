"""The rescaling of one donor, which most tests have."""

from __future__ import annotations

import pytest

from toolkit.bridge.rescaling import LossReduction, RescaleRule, rescale_factors

SETTINGS: list[tuple[RescaleRule, LossReduction]] = [
    ("match", "mean"), ("match", "sum"), ("append", "mean"), ("append", "sum"), ("pool", "mean"),
]  # fmt: skip
each_setting = pytest.mark.parametrize(("rule", "reduction"), SETTINGS)


def two_factors(
    rule: RescaleRule,
    reduction: LossReduction,
    num_own: float,
    num_donor: float,
    weight: float = 1.0,
) -> tuple[float, float]:
    """The factors of the receiver's own and of the donor's sum."""
    own, donors = rescale_factors(rule, reduction, num_own, {"h2": num_donor}, {"h2": weight})
    return own, donors["h2"]
