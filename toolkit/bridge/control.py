"""How the ranks of one job agree: the main process decides, the others follow.

A group of its own over gloo, beside DDP's, so that votes and waits never mix with gradient
collectives and need no device.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator

from toolkit.bridge.polling import pause

T = TypeVar("T")

SLICE_SECONDS = 5.0  # the other ranks stand in a broadcast at most this long at a time

# Groups that were left, which torch 2.6 must not delete yet: it would wait for a group's threads
# without letting go of Python's lock, which one of them may need to delete a tensor first.
_LEFT: list[dist.ProcessGroup] = []


class ControlGroup:
    """Decisions and small sums over the ranks of one job.

    Every method is a collective: all ranks call it, in the same order. A rank that does not come
    is an error as late as in the job's other collectives: by default after 30 minutes.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.num_processes = accelerator.num_processes
        self.is_main_process = accelerator.is_main_process
        handler = accelerator.init_handler  # of the user, whose timeout holds for all groups
        timeout = handler.timeout if handler is not None else None
        self._group = (
            dist.new_group(backend="gloo", timeout=timeout) if self.num_processes > 1 else None
        )

    def on_main(self, function: Callable[[], T]) -> T:
        """What ``function`` returns on the main process, on every rank; it runs nowhere else.

        What it raises there is raised on every rank, so that no rank waits for another that left.
        """
        if self._group is None:
            return function()
        outcome: list[Any] = [None, None]
        if self.is_main_process:
            try:
                outcome[0] = function()
            except Exception as error:
                dist.broadcast_object_list([None, error], src=0, group=self._group)
                raise
        dist.broadcast_object_list(outcome, src=0, group=self._group)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def decide(self, poll: Callable[[], T | None]) -> tuple[T, float]:
        """Poll on the main process until there is a decision; the same one on every rank.

        Args:
            poll: the decision, or None for not yet; it ends its waits by itself.

        Returns:
            The decision and the seconds waited.
        """
        start = time.monotonic()

        def one_slice() -> tuple[T, float] | None:
            end = time.monotonic() + SLICE_SECONDS
            while time.monotonic() < end:
                decision = poll()
                waited = time.monotonic() - start
                if decision is not None:
                    return decision, waited
                pause(waited)
            return None

        while True:
            outcome = self.on_main(one_slice)
            if outcome is not None:
                return outcome

    def agree(self, ok: bool) -> bool:
        """Whether ``ok`` holds on every rank."""
        return self.min(float(ok)) > 0

    def min(self, value: float) -> float:
        """The smallest ``value`` of all ranks."""
        return self._reduce([value], dist.ReduceOp.MIN)[0]

    def sum(self, values: Sequence[float]) -> list[float]:
        """The sums of ``values`` over ranks, in float64."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def close(self) -> None:
        """Leave the group together: ranks that end apart from each other may abort at exit."""
        if self._group is not None:
            dist.barrier(self._group)
            dist.destroy_process_group(self._group)
            _LEFT.append(self._group)
            self._group = None

    def _reduce(self, values: Sequence[float], operation: dist.ReduceOp.RedOpType) -> list[float]:
        if self._group is None:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, op=operation, group=self._group)
        return tensor.tolist()
