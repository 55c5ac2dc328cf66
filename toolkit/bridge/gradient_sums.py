"""A window's gradients as a payload holds them: sums over samples, whole, on the CPU."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from toolkit.bridge.payload import payload_dtype
from toolkit.sharding import full_tensor


class GradientSums:
    """Takes gradient sums out of ``.grad``, into memory that is used again where that pays."""

    def __init__(self) -> None:
        self._staged: dict[str, Tensor] = {}

    @torch.no_grad()
    def take(
        self,
        parameters: Mapping[str, nn.Parameter],
        factor: float,
        *,
        stage: bool,
        may_overwrite: bool,
    ) -> dict[str, Tensor]:
        """The sums, by name; zeros for a parameter without a gradient. A collective if sharded.

        Args:
            parameters: by name.
            factor: makes a sum of a gradient.
            stage: the sums are written while the next window runs; those of the last call must not
                be needed any more.
            may_overwrite: nobody else needs the gradients.
        """
        sums: dict[str, Tensor] = {}
        for name, parameter in parameters.items():
            dtype = payload_dtype(parameter.dtype)
            if parameter.grad is None:
                sums[name] = torch.zeros(parameter.shape, dtype=dtype)
                continue
            grad = full_tensor(parameter.grad)
            if stage:
                # New memory takes longer to get than to fill.
                if name not in self._staged:
                    self._staged[name] = torch.empty(grad.shape, dtype=dtype)
                sums[name] = self._staged[name].copy_(grad).mul_(factor)
            else:
                grad = grad.to(dtype=dtype)
                scaled = grad.mul_(factor) if may_overwrite else grad * factor
                sums[name] = scaled.cpu().contiguous()
        return sums
