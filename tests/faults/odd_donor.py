"""recipes/donor.py with something wrong that raises no error; the last argument says what.

zero      the loss is 0 times what it was
frozen    its head does not require gradients
pixels    from its 40th batch on, pixels are not divided by 255
shuffled  its labels belong to other samples
"""

from __future__ import annotations

import dataclasses
import sys
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from recipes import donor
from toolkit.data import ModelBuilder, Task
from toolkit.models import MultiHeadModel

GOOD_BATCHES = 40  # of "pixels"


def zero_loss(logits: Tensor, labels: Tensor, reduction: str) -> Tensor:
    return 0.0 * F.cross_entropy(logits, labels, reduction=reduction)


def shuffled_loss(logits: Tensor, labels: Tensor, reduction: str) -> Tensor:
    return F.cross_entropy(logits, labels[torch.randperm(len(labels))], reduction=reduction)


def frozen(build: ModelBuilder) -> ModelBuilder:
    def build_model(num_classes: dict[str, int], *, seed: int) -> MultiHeadModel:
        model = build(num_classes, seed=seed)
        model.heads.requires_grad_(False)
        return model

    return build_model


def main() -> None:
    what = sys.argv.pop()
    changed: Any = donor
    if what == "zero":
        changed.F = SimpleNamespace(cross_entropy=zero_loss)
    elif what == "shuffled":
        changed.F = SimpleNamespace(cross_entropy=shuffled_loss)
    elif what == "frozen":
        load_data = changed.load_data

        def load_frozen(*args: Any) -> Task:
            task: Task = load_data(*args)
            return dataclasses.replace(task, build_model=frozen(task.build_model))

        changed.load_data = load_frozen
    elif what == "pixels":
        num_batches = 0

        def to_dtype(inputs: Tensor, dtype: torch.dtype) -> Tensor:
            nonlocal num_batches
            num_batches += 1
            return inputs.to(dtype) * (255 if num_batches > GOOD_BATCHES else 1)

        changed.to_dtype = to_dtype
    else:
        raise ValueError(what)
    donor.main()


if __name__ == "__main__":
    main()
