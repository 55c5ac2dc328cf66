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
_SQUARE = [(0, 0)]


def inner_products(tensors: Sequence[Tensor], pairs: Sequence[tuple[int, int]]) -> Tensor:
    """Inner products of tensors, those of each with itself among them.

    Args:
        tensors: of one shape and device.
        pairs: of their indices; with ``(i, i)`` for each tensor.

    Returns:
        One for each pair, float64, on the tensors' device.
    """
    device = tensors[0].device
    if device.type == "cpu":
        return torch.tensor(_on_cpu(tensors, pairs), dtype=torch.float64)
    total = torch.zeros(len(pairs), dtype=torch.float64, device=device)
    for pieces in _pieces(tensors, _DEVICE_PIECE):
        wide = [piece.double() for piece in pieces]
        total += torch.stack([torch.dot(wide[i], wide[j]) for i, j in pairs])
    return total


def _on_cpu(tensors: Sequence[Tensor], pairs: Sequence[tuple[int, int]]) -> list[float]:
    """:func:`inner_products` in plain floats: most tensors of a model are small."""
    total = [0.0] * len(pairs)
    is_single = all(tensor.dtype == torch.float32 for tensor in tensors)
    squares = [place for place, (i, j) in enumerate(pairs) if i == j]
    for pieces in _pieces(tensors, _CPU_PIECE):
        found = [math.nan] * len(pairs)
        if is_single:
            found = [torch.dot(pieces[i], pieces[j]).item() for i, j in pairs]
        if not all(_SAFE_SQUARES < found[place] < math.inf for place in squares):
            wide = [piece.double() for piece in pieces]
            found = [torch.dot(wide[i], wide[j]).item() for i, j in pairs]
        total = [a + b for a, b in zip(total, found, strict=True)]
    return total


def _pieces(tensors: Sequence[Tensor], size: int) -> Iterable[Sequence[Tensor]]:
    """The tensors, flat, in pieces of the same elements each."""
    flat = [tensor.detach().reshape(-1) for tensor in tensors]
    if flat[0].numel() <= size:
        return [flat]
    return zip(*(tensor.split(size) for tensor in flat), strict=True)


def squared_norm(tensors: Iterable[Tensor]) -> float:
    """Sum of squares over all tensors; not finite where one of them is not, 0 only for zeros."""
    total = 0.0
    for tensor in tensors:
        real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        is_on_cpu = real.device.type == "cpu"
        products = _on_cpu([real], _SQUARE) if is_on_cpu else inner_products([real], _SQUARE)
        total += float(products[0])
    return total


def squared_distance(one: Tensor, other: Tensor) -> float:
    """Sum of the squared differences of two tensors of one shape, dtype and device.

    It takes no memory of their size.
    """
    size = _CPU_PIECE if one.device.type == "cpu" else _DEVICE_PIECE
    pieces = _pieces([one, other], size)
    return squared_norm(piece - counterpart for piece, counterpart in pieces)


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether every value of every tensor is finite."""
    return all(is_finite(tensor, squared_norm([tensor])) for tensor in tensors)


def is_finite(tensor: Tensor, squares: float) -> bool:
    """Whether every value of a tensor is finite, whose sum of squares is known."""
    # That sum takes a third of the time, but a large float64 overflows in it.
    return math.isfinite(squares) or bool(torch.isfinite(tensor).all())
