"""Windows whose loss overflows under a loss scaler, and which windows the steps must then pair.

A payload or skip record that meets an overflow of the receiver stays pending: the next try takes
it with the receiver's next batch. Joint training of one job would throw both batches away.
"""

from __future__ import annotations

import itertools

import torch

from tests.matrix.joint import Pair, count, windows
from tests.matrix.setting import Setting, Side, Silo
from toolkit.bridge.config import Role

# Windows of each job, counted from 0. A receiver's overflow keeps the donor waiting with the same
# payload, so that "both" meet in one try at window 4.
WINDOWS: dict[str, dict[Role, tuple[int, ...]]] = {
    "no": {"receiver": (), "donor": ()},
    "receiver": {"receiver": (0, 4, 5), "donor": ()},
    "donor": {"receiver": (), "donor": (0, 4, 5)},
    "both": {"receiver": (4, 8), "donor": (4, 9)},
}

OVERFLOWS: dict[str, Setting] = {
    f"overflow on {where}, {optimizer}, {dtype}": Setting(
        receiver=Side(ranks=2, precision="fp16", accumulation=3 if where == "both" else 1),
        donor=Side(ranks=2, precision="fp16", accumulation=3 if where == "donor" else 1),
        dtype=dtype,
        optimizer=optimizer,
        clip=dtype == "float64",
        overflow=where,
        num_steps=20,
    )
    for where in ("donor", "receiver", "both")
    for optimizer in ("momentum foreach", "sgd fused", "adamw foreach", "adamw fused")
    for dtype in ("float64", "float32")
} | {
    f"overflow on both, {optimizer}, float32, fsdp2": Setting(
        receiver=Side(ranks=2, precision="fp16", wrapper="fsdp2", accumulation=3),
        donor=Side(ranks=2, precision="fp16", wrapper="fsdp2"),
        dtype="float32",
        optimizer=optimizer,
        overflow="both",
        num_steps=20,
    )
    for optimizer in ("adamw foreach", "adamw fused")
}


def loss_factor(setting: Setting, role: Role, window: int) -> float:
    """What a loss is multiplied by: finite, but not times the loss scale, be it halved twice."""
    if window not in WINDOWS[setting.overflow][role]:
        return 1.0
    return torch.finfo(getattr(torch, setting.dtype)).max / 4


def expected_pairs(setting: Setting) -> list[Pair]:
    """The windows that each step must take: none of the donor's twice, and none lost."""
    pairs: list[Pair] = []
    own, silo, overflows = -1, Silo(setting, "donor"), WINDOWS[setting.overflow]
    donated = itertools.islice(windows(setting, "donor"), setting.num_steps)
    for donor_window, indices in enumerate(donated):
        own += 1
        while own in overflows["receiver"]:
            own += 1
        is_skip = donor_window in overflows["donor"] or not count(setting, silo, indices)
        pairs.append((own, None if is_skip else donor_window))
    return pairs
