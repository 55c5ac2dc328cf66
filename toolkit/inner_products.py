"""Inner products of large tensors, as exact as float64 sums of float32 ones and much faster.

A copy of a tensor in float64 costs more than all of the rest. Tensors are taken in pieces that stay
in the processor's cache; within one, float32 is summed in float32 (to about 1e-7 of its norm),
unless that over- or underflows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

_CPU_PIECE, _DEVICE_PIECE = 2**16, 2**24  # elements
# Squares below the least float32 add up to less than 1e-7 of this in a piece.
_SAFE_SQUARES = 1e-26


def inner_products(tensors: Sequence[Tensor], pairs: Sequence[tuple[int, int]]) -> Tensor:
    """Inner products of tensors, those of each with itself among them.

    Args:
        tensors: of one shape and device.
        pairs: of their indices; with ``(i, i)`` for each tensor.

    Returns:
        One for each pair, float64, on the tensors' device.
    """
    first = tensors[0]
    is_on_cpu = first.device.type == "cpu"
    piece = _CPU_PIECE if is_on_cpu else _DEVICE_PIECE
    is_single = is_on_cpu and all(tensor.dtype == torch.float32 for tensor in tensors)
    squares = [place for place, (i, j) in enumerate(pairs) if i == j]
    total = torch.zeros(len(pairs), dtype=torch.float64, device=first.device)
    for pieces in zip(*(t.detach().flatten().split(piece) for t in tensors), strict=True):
        if is_single:
            found = torch.stack([torch.dot(pieces[i], pieces[j]) for i, j in pairs]).double()
            norms = found[squares]
            if float(norms.min()) > _SAFE_SQUARES and float(norms.max()) < math.inf:
                total += found
                continue
        wide = [part.double() for part in pieces]
        total += torch.stack([torch.dot(wide[i], wide[j]) for i, j in pairs])
    return total


def squared_norm(tensors: Iterable[Tensor]) -> float:
    """Sum of squares over all tensors; not finite where one of them is not, 0 only for zeros."""
    total = 0.0
    for tensor in tensors:
        real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        total += float(inner_products([real], [(0, 0)]))
    return total


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether every value of every tensor is finite."""
    # The sum of squares tells in a third of the time, but a large float64 overflows in it.
    return all(
        math.isfinite(squared_norm([tensor])) or bool(torch.isfinite(tensor).all())
        for tensor in tensors
    )
