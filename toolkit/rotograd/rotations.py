"""Rotations that are trained: a fixed base, a tangent, and the fold of one into the other."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

# ||A^2|| above which the second-order fold leaves more than Newton-Schulz steps should mend.
_LARGE = 0.25
_MAX_NEWTON_SCHULZ = 5
_NUM_PROBES = 4


class Rotations(nn.Module):
    """A rotation R_k of d features for each of K tasks, trained through a tangent.

    R_k exp(A_k) with A_k = tril(X_k, -1) - tril(X_k, -1)^T is a rotation for any X_k. X is what
    the optimizer holds. It is 0 whenever a gradient is taken, which makes that gradient closed
    form; after the optimizer's step :meth:`fold` moves the base, R <- R exp(A) to second order,
    and X <- 0. All of it stays in float32 or better, whatever the rest of the model is cast to.

    Attributes:
        matrices: R, of shape (K, d, d). A parameter only so that it is no buffer, which
            DistributedDataParallel would send at every forward; it must stay frozen.
        tangents: X, of shape (K, d, d), of which the strictly lower triangles count.

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
        self.tangents = nn.Parameter(torch.zeros_like(matrices))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """``to``, ``half``, ``bfloat16``...: follow to devices, but to no lower precision."""

        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.is_floating_point() and moved.dtype != _at_least_float32(moved.dtype):
                return tensor.to(moved.device)
            return moved

        return super()._apply(keep_precision, recurse)

    @torch.no_grad()
    def fold(self) -> None:
        """Move the base by the tangent, R <- R (I + A + A^2 / 2), and set the tangent to 0.

        The factor's singular values are sqrt(1 + s^4 / 4) for each singular value s of A: what is
        lost of orthogonality is of fourth order, and is mended before it is seen. A large A goes
        through the matrix exponential.
        """
        lower = self.tangents.tril(-1)
        skew = lower - lower.mT
        square = skew @ skew
        size = float(torch.linalg.matrix_norm(square).max())
        if _LARGE < size < math.inf:
            self.matrices.copy_(self.matrices @ torch.linalg.matrix_exp(skew))
        else:
            step = skew.add_(square, alpha=0.5)
            self.matrices.copy_(torch.baddbmm(self.matrices, self.matrices, step))
        self.tangents.zero_()
        self._mend()

    def _mend(self) -> None:
        """Newton-Schulz steps R <- R (3 I - R^T R) / 2 until R is orthogonal up to rounding."""
        tolerance = 10 * torch.finfo(self.matrices.dtype).eps
        for _ in range(_MAX_NEWTON_SCHULZ):
            if self.orthogonality_error() <= tolerance:
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


def rotate(rows: Tensor, matrix: Tensor) -> Tensor:
    """Rotate the first features of each row, as many as ``matrix`` has, in the matrix's precision.

    Args:
        rows: (N, d) of any floating point type, which the result has too.
        matrix: (m, m) with m <= d.
    """
    size = len(matrix)
    with torch.autocast(rows.device.type, enabled=False):
        rotated = nn.functional.linear(rows[:, :size].to(matrix.dtype), matrix).to(rows.dtype)
    return rotated if size == rows.shape[1] else torch.cat([rotated, rows[:, size:]], 1)


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
        return rotate(as_rows(features, self.size_z), self.matrix).view(features.shape)


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
