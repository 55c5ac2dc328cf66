"""The arithmetic of bytes and round trips against what real jobs say that they have published."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from tests.recipes.running import DONOR, RECEIVER, TIMEOUT, Recipes
from toolkit import BridgeConfig
from toolkit.benchmarks.traffic import traffic_of

STEPS = 16
HEADER_BYTES = 4096  # at most, of a record of this small model
# Beside one record a period: the first or the last weights, and the end.
MORE_RECORDS = 3

slow = pytest.mark.slow


@pytest.mark.parametrize(
    "settings",
    [
        {"exchange": "gradient", "compression": "topk", "topk_ratio": 0.05},
        pytest.param({"exchange": "gradient", "compression": "bf16"}, marks=slow),
        pytest.param({"exchange": "gradient", "max_staleness": 2}, marks=slow),
        pytest.param({"exchange": "gradient", "scope": "head"}, marks=slow),
        pytest.param({"exchange": "delta", "local_steps": 4}, marks=slow),
        pytest.param({"exchange": "delta", "local_steps": 4, "compression": "topk"}, marks=slow),
        pytest.param({"exchange": "distill", "publish_every": 4}, marks=slow),
        pytest.param({"exchange": "head", "publish_every": 2}, marks=slow),
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_that_real_jobs_publish_what_is_calculated(
    recipes: Recipes, settings: dict[str, Any]
) -> None:
    both = {"exchange", "local_steps", "scope"}
    flags: dict[str, list[object]] = {"donor": [], "receiver": []}
    for name, value in settings.items():
        roles = ["donor", "receiver"] if name in both else ["donor"]
        for role in ["receiver"] if name == "max_staleness" else roles:
            flags[role] += [f"--{name}", value]
    if settings["exchange"] != "head":  # there the donor does not wait, and may end first
        flags["receiver"].append("--require_peer")
    jobs = [
        recipes(DONOR, "--require_peer", "--max_train_steps", STEPS, *flags["donor"]),
        recipes(RECEIVER, "--max_train_steps", STEPS, *flags["receiver"]),
    ]
    for job in jobs:
        job.wait(TIMEOUT)

    weights = recipes.weights("0001", "donor")
    num_head = sum(w.numel() for name, w in weights.items() if name.startswith("heads.h2."))
    num_backbone = sum(w.numel() for name, w in weights.items() if name.startswith("backbone."))
    config = BridgeConfig(**settings)
    found = traffic_of(config, num_backbone, num_head, torch.float64)
    for role in ("receiver", "donor"):
        results = recipes.results("0001", role)
        records = results["published_records"]
        calculated = STEPS * getattr(found, f"{role}_records")
        # Who is late may pass some over.
        fewest = calculated - STEPS // 2 if config.max_staleness else calculated
        assert fewest < records <= calculated + MORE_RECORDS
        if not calculated:
            continue
        size = getattr(found, f"{role}_bytes") / getattr(found, f"{role}_records")
        whole = (num_backbone + num_head) * torch.float64.itemsize
        extra = {size}
        if role == "donor" and config.exchange == "head":
            extra = {whole}  # its own weights, at the beginning and at the end
        least = fewest * size
        most = calculated * size + MORE_RECORDS * max(extra) + records * HEADER_BYTES
        assert least < results["published_bytes"] <= most


def test_one_billion_parameters() -> None:
    late = BridgeConfig(exchange="gradient", max_staleness=1)
    lockstep = traffic_of(BridgeConfig(exchange="gradient"), 10**9, 0)
    assert (lockstep.receiver_bytes, lockstep.donor_bytes, lockstep.waits) == (4e9, 4e9, 1)
    assert traffic_of(late, 10**9, 0) == dataclasses.replace(lockstep, waits=0)
    topk = traffic_of(BridgeConfig(exchange="gradient", compression="topk"), 10**9, 0)
    assert topk.donor_bytes == pytest.approx(4e7, rel=2e-3)
    delta = traffic_of(BridgeConfig(exchange="delta", local_steps=32), 10**9, 0)
    assert (delta.receiver_bytes, delta.donor_bytes, delta.waits) == (1.25e8, 1.25e8, 1 / 32)
