"""What must be remembered of earlier steps: how large losses and gradients were at first."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(slots=True)
class History:
    """Steps so far, and each task's loss and gradient norm in the first and the burn-in's last one.

    Attributes:
        step: optimizer steps that have happened.
        initial_norms: (K,), n0_k; nan for a task that has had no gradient so far.
        initial_losses: (K,), L0_k; nan likewise, or where losses were not given.
        complete: whether it is known that none of them is nan.
    """

    step: int
    initial_norms: Tensor
    initial_losses: Tensor
    complete: bool = False

    def note_completeness(self) -> None:
        """Look for what is missing, until nothing is."""
        if not self.complete:
            both = torch.stack([self.initial_norms, self.initial_losses.to(self.initial_norms)])
            self.complete = not both.isnan().any()

    @classmethod
    def empty(cls, num_tasks: int) -> History:
        """Before the first step."""
        return cls(0, torch.full((num_tasks,), torch.nan), torch.full((num_tasks,), torch.nan))

    def to_tensor(self) -> Tensor:
        """All of it in float64, of shape (1 + 2 K,)."""
        parts = [torch.tensor([self.step]), self.initial_norms, self.initial_losses]
        return torch.cat([part.detach().to("cpu", torch.float64) for part in parts])

    @classmethod
    def from_tensor(cls, tensor: Tensor) -> History:
        """The inverse of :meth:`to_tensor`."""
        step, norms, losses = tensor.split([1, len(tensor) // 2, len(tensor) // 2])
        return cls(int(step), norms.clone(), losses.clone())


def reference(initial: Tensor, now: Tensor, usable: Tensor, *, again: bool) -> Tensor:
    """What to measure ``now`` against: the value of the first time, or of this one.

    Args:
        initial: (K,), recorded so far, nan where not yet.
        now: (K,), of this step.
        usable: (K,), whether ``now`` may be recorded.
        again: replace what was recorded.
    """
    due = usable & now.isfinite()
    return torch.where(due if again else due & initial.isnan(), now, initial)
