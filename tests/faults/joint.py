"""What the two recipes must come to: one process, one loss, the windows that a ledger names."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import islice
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

from recipes import receiver
from toolkit.data import to_dtype, window_indices
from toolkit.optimizers import build_optimizer, build_scheduler, parameter_groups
from toolkit.silos import load_data


def joint_weights(
    flags: Sequence[str], num_processes: int, donor_windows: Sequence[int | None]
) -> dict[str, Tensor]:
    """The weights after one joint step for each of the donor's windows named.

    Args:
        flags: of ``recipes/receiver.py``; the donor's data and batch size are as its own.
        num_processes: ranks of each job.
        donor_windows: by receiver step, the number of the donor's window from 0 on; None for a step
            without it.
    """
    with mock.patch.object(sys, "argv", ["receiver.py", *flags]):
        args = receiver.parse_arguments()
    task = load_data(args, "h1")
    dtype = getattr(torch, args.dtype)
    model = task.build_model(task.classes_of(["h1", "h2"]), seed=args.seed).to(dtype)
    optimizer = build_optimizer(args, parameter_groups(args, model))
    scheduler = build_scheduler(args, optimizer, args.max_train_steps)
    order = {}
    for head in ("h1", "h2"):
        rows = len(task.train[head])
        windows = window_indices(
            rows, args.per_device_train_batch_size, 1, num_processes, seed=args.seed
        )
        highest = max(number for number in donor_windows if number is not None)
        order[head] = list(islice(windows, max(len(donor_windows), highest + 1)))
    for step, number in enumerate(donor_windows):
        of_donor = [] if number is None else [("h2", order["h2"][number])]
        for head, window in [("h1", order["h1"][step]), *of_donor]:
            rows = task.train[head].with_format("torch")[window]
            logits = model(to_dtype(rows["inputs"], dtype), [head])[head]
            F.cross_entropy(logits, rows[head]).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}
