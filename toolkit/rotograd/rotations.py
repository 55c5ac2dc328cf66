"""Rotations that are trained: a fixed base, a tangent, and the fold of one into the other."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import Tensor, nn

# ||A^2|| above which the second-order fold leaves more than Newton-Schulz steps should mend.
_LARGE = 0.25
_MAX_NEWTON_SCHULZ = 5
_NUM_PROBES = 4


class Rotations(nn.Module):
    """A rotation R_k of d features for each of K tasks, trained through a tangent.

    R_k exp(A_k) is a rotation for any skew-symmetric A_k, given by its strictly lower triangle X_k.
    X is what the optimizer holds. It is 0 whenever a gradient is taken, which makes that gradient
    closed form; after the optimizer's step :meth:`fold` moves the base, R <- R exp(A) to second
    order, and X <- 0. All of it stays in float32 or better, whatever the rest of the model is cast
    to.

    Attributes:
        matrices: R, of shape (K, d, d). A parameter only so that it is no buffer, which
            DistributedDataParallel would send at every forward; it must stay frozen.
        tangents: X, of shape (K, d, ceil(d / 2)), in which two triangles fill a rectangle: see
            :func:`pack`.

    Args:
        num_tasks: K.
        size: d.
        init: start from the identity, which leaves what the heads see as it was, or from rotations
            drawn uniformly at random from the default generator.

    Raises:
        ValueError: for an unknown ``init`` or sizes below 1.
    """

    matrices: nn.Parameter
    tangents: nn.Parameter

    def __init__(self, num_tasks: int, size: int, init: Literal["identity", "random"]) -> None:
        super().__init__()
        if num_tasks < 1 or size < 1:
            raise ValueError(f"need at least one task and one feature, got {num_tasks} and {size}")
        if init == "identity":
            matrices = torch.eye(size, dtype=_at_least_float32(torch.get_default_dtype()))
            matrices = matrices.repeat(num_tasks, 1, 1)
        elif init == "random":
            matrices = torch.stack([_random_rotation(size) for _ in range(num_tasks)])
        else:
            raise ValueError(f'init must be "identity" or "random", got {init!r}')
        self.matrices = nn.Parameter(matrices, requires_grad=False)
        self.tangents = nn.Parameter(matrices.new_zeros(num_tasks, size, (size + 1) // 2))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """``to``, ``half``, ``bfloat16``...: follow to devices, but to no lower precision."""

        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.is_floating_point() and moved.dtype != _at_least_float32(moved.dtype):
                return tensor.to(moved.device)
            return moved

        return super()._apply(keep_precision, recurse)

    @torch.no_grad()
    def fold(self, *, mend: bool = True) -> None:
        """Move the base by the tangent, R <- R (I + A + A^2 / 2), and set the tangent to 0.

        The factor's singular values are sqrt(1 + s^4 / 4) for each singular value s of A, so that
        orthogonality is lost in fourth order only. A large A goes through the matrix exponential.

        Args:
            mend: look for what was lost, and mend it. After a fold that may have lost more than is
                tolerated this happens in any case.
        """
        skew = unpack(self.tangents)
        square = torch.bmm(skew, skew)
        size = float(torch.linalg.matrix_norm(square).max())
        if _LARGE < size < math.inf:
            self.matrices.copy_(self.matrices @ torch.linalg.matrix_exp(skew))
        else:
            step = skew.add_(square, alpha=0.5)
            self.matrices.copy_(torch.baddbmm(self.matrices, self.matrices, step))
        self.tangents.zero_()
        lost = size**2 / 4 / math.sqrt(skew.shape[-1])  # at most, by orthogonality_error's measure
        if mend or not lost < self._tolerance():
            self._mend()

    def _tolerance(self) -> float:
        return 32 * torch.finfo(self.matrices.dtype).eps

    def _mend(self) -> None:
        """Newton-Schulz steps R <- R (3 I - R^T R) / 2 until R is orthogonal."""
        for _ in range(_MAX_NEWTON_SCHULZ):
            if self.orthogonality_error() <= self._tolerance():
                return
            gram = self.matrices.mT @ self.matrices
            mended = torch.baddbmm(self.matrices, self.matrices, gram, beta=1.5, alpha=-0.5)
            self.matrices.copy_(mended)

    @torch.no_grad()
    def orthogonality_error(self) -> float:
        """About ||R_k^T R_k - I|| / sqrt(d), the largest of all tasks, from a few fixed vectors."""
        size, device = self.matrices.shape[-1], self.matrices.device
        rows = torch.arange(1, size + 1, device=device, dtype=self.matrices.dtype)
        shifts = torch.arange(_NUM_PROBES, device=device, dtype=self.matrices.dtype)
        probes = torch.cos(rows.square()[:, None] + shifts)
        errors = self.matrices.mT @ (self.matrices @ probes) - probes
        return float(torch.linalg.matrix_norm(errors).max() / torch.linalg.matrix_norm(probes))


def pack(products: Tensor) -> Tensor:
    """(K, d, h), the strictly lower triangle of P - P^T for each of K matrices P, h = ceil(d / 2).

    That is the gradient for X at 0 where P is the one for exp(A). Of the triangle, the rows from h
    on of the first h columns lie in the same place of the result, and the triangle above them too;
    the last triangle lies transposed above the diagonal, which is unused.

    Args:
        products: (K, d, d).
    """
    half = (products.shape[-1] + 1) // 2
    first, last = products[:, :half, :half], products[:, half:, half:]
    result = products.new_empty(*products.shape[:2], half)
    torch.sub(products[:, half:, :half], products[:, :half, half:].mT, out=result[:, half:])
    top = result[:, :half]
    torch.sub(first, first.mT, out=top)
    top.tril_(-1)
    rest = last.shape[-1]
    top[:, :rest, :rest] += (last.mT - last).triu_(1)
    return result


def unpack(packed: Tensor) -> Tensor:
    """(K, d, d), the skew-symmetric matrices of what :func:`pack` gives.

    Args:
        packed: (K, d, ceil(d / 2)).
    """
    num_tasks, size, half = packed.shape
    rest = size - half
    top, bottom = packed[:, :half], packed[:, half:]
    result = packed.new_empty(num_tasks, size, size)
    result[:, half:, :half] = bottom
    torch.neg(bottom.mT, out=result[:, :half, half:])
    lower, upper = top.tril(-1), top[:, :rest, :rest].triu(1)
    torch.sub(lower, lower.mT, out=result[:, :half, :half])
    torch.sub(upper.mT, upper, out=result[:, half:, half:])
    return result


def rotate(rows: Tensor, matrices: Iterable[Tensor]) -> list[Tensor]:
    """Rotate the first features of each row, as many as a matrix has, in the matrix's precision.

    Args:
        rows: (N, d) of any floating point type, which the results have too.
        matrices: (m, m) each, with m <= d; a result for each.
    """
    results = []
    with torch.autocast(rows.device.type, enabled=False):
        for matrix in matrices:
            size = len(matrix)
            rotated = nn.functional.linear(rows[:, :size].to(matrix.dtype), matrix).to(rows.dtype)
            whole = size == rows.shape[1]
            results.append(rotated if whole else torch.cat([rotated, rows[:, size:]], 1))
    return results


def as_rows(features: Tensor, size: int) -> Tensor:
    """(N, d): a feature vector is the last dimension if its size fits, else a whole sample.

    Raises:
        ValueError: if neither is of that size.
    """
    shape = tuple(features.shape)
    fits = shape[-1:] == (size,) or (len(shape) > 1 and math.prod(shape[1:]) == size)
    if not fits:
        raise ValueError(
            f"size_z is {size}, but the backbone returned features of shape {shape}: neither their "
            "last dimension nor all but the first together are of that size"
        )
    return features.reshape(-1, size)


class Rotation(nn.Module):
    """One task's rotation by itself, in the memory of the others.

    Args:
        matrix: (m, m), a row of :attr:`Rotations.matrices`.
        size_z: d, as of the model.
    """

    def __init__(self, matrix: Tensor, size_z: int) -> None:
        super().__init__()
        self.matrix, self.size_z = nn.Parameter(matrix.detach(), requires_grad=False), size_z

    def forward(self, features: Tensor) -> Tensor:
        (rotated,) = rotate(as_rows(features, self.size_z), [self.matrix])
        return rotated.view(features.shape)


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _random_rotation(size: int) -> Tensor:
    """A uniformly distributed rotation: QR of a normal matrix, signs fixed, determinant 1."""
    dtype = _at_least_float32(torch.get_default_dtype())
    matrix, upper = torch.linalg.qr(torch.randn(size, size, dtype=dtype))
    matrix = matrix * upper.diagonal().sign()
    if torch.linalg.det(matrix) < 0:
        matrix[:, 0] = -matrix[:, 0]
    return matrix
