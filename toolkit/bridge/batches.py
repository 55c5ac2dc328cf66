"""Which batches a donor's windows have: a function of their number, whatever was interrupted."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from accelerate import Accelerator, skip_first_batches
from accelerate.data_loader import DataLoaderStateMixin
from torch.utils.data import DataLoader


def windows_per_epoch(dataloader: DataLoader[Any], accelerator: Accelerator) -> int:
    """How many accumulation windows one pass over a dataloader has.

    Raises:
        ValueError: if it is empty, or its end is not the end of a window.
    """
    if not len(dataloader):
        raise ValueError("the dataloader to follow is empty")
    if not accelerator.gradient_state.sync_with_dataloader:
        raise ValueError(
            "follow() needs accumulation windows that end with the dataloader: leave "
            "GradientAccumulationPlugin(sync_with_dataloader=True) as it is"
        )
    accumulation = accelerator.gradient_accumulation_steps
    if not _is_prepared(dataloader) and len(dataloader) % accumulation:
        raise ValueError(
            f"{len(dataloader)} batches are no whole number of windows of {accumulation}, and "
            "only a dataloader from accelerator.prepare() ends one with its last batch: "
            "prepare it, or leave batches out (drop_last=True)"
        )
    return math.ceil(len(dataloader) / accumulation)


def batches_from(dataloader: DataLoader[Any], epoch: int, first: int) -> Iterable[Any]:
    """The batches of an epoch, from its batch number ``first`` on."""
    shuffled: Any = dataloader if _is_prepared(dataloader) else getattr(dataloader, "sampler", None)
    if hasattr(shuffled, "set_epoch"):
        shuffled.set_epoch(epoch)
    return skip_first_batches(dataloader, first) if first else dataloader


def _is_prepared(dataloader: DataLoader[Any]) -> bool:
    return isinstance(dataloader, DataLoaderStateMixin)
