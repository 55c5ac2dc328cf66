"""Between backbone and heads: one node of the graph that sees all tasks' gradients together.

Let z be the features (N rows of d), R_k the rotation of task k, r_k = z R_k^T what its head sees
and Gr_k = dL_k / dr_k. Then G_k = Gr_k R_k is the gradient for z through task k, and its norm that
of Gr_k. An ordinary backward of a sum of losses brings all Gr_k to this node at once.

**Rotations.** The paper turns R_k so that task k's gradient points where those of all tasks point
on average: it minimises -sum_n <R_k v_n, gr_kn> over R_k, where v_n = 1/K sum_k g_kn / sigma_k and
gr are held constant. With R_k exp(A), A = tril(X, -1) - tril(X, -1)^T, a change dA at X = 0 changes
that by -sum_n gr_kn^T R_k dA v_n = -<dA, G_k^T V>. So its gradient for X_k is

    -tril(S_k - S_k^T, -1),    S_k = G_k^T V,    V = 1/K sum_k G_k / sigma_k.

sigma_k = ||G_k|| / sqrt(N) is the root mean square of the samples' gradients. As losses are means
over the batch, so is S_k, which neither grows nor shrinks with the batch. It is linear in the
losses, and so the same after a loss scaler has unscaled it.

The package ``rotograd`` has -2/N tril(...) up to version 0.1.5.2 and -2 tril(...) in 0.1.6.0, both
with m / ||G_k|| for 1 / sigma_k, m = ||1/K sum_k G_k||. That m makes it quadratic in the losses,
and 2/N takes a mean of what is a mean already. Here it is 0.1.5.2 without these two: its gradient
times N^1.5 / (2 m), one factor for all tasks, which an optimizer like Adam does not see.

**Ranks.** Rank w has G_k^w of its own mean loss, and DistributedDataParallel averages what the
ranks make of it: the global gradient's rows are G_k^w / W. All inner products are summed over the
ranks in one all-reduce; rank w returns sum_k weight_k G_k^w for z, and S_k from its own rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from toolkit.rotograd.accumulation import Window
from toolkit.rotograd.rotations import pack, rotate
from toolkit.rotograd.weighting import Statistics, inverse


class Weighting(Protocol):
    """What decides on the tasks' weights when their gradients are known."""

    coop_enabled: bool
    exact_accumulation: bool
    measure_before_rotation: bool

    def note(self, losses: Tensor, slope: Tensor) -> None:
        """Take (K,) this rank's losses, and what multiplies their sum in the loss of backward()."""

    def given_losses(self) -> Tensor | None:
        """(K,), this rank's losses, if they are needed."""

    def open_window(self) -> Window | None:
        """What earlier micro-batches of this step left, if it matters."""

    def weigh(self, statistics: Statistics) -> tuple[Tensor, Tensor | None]:
        """(K,) weights of the tasks' gradients, and the gradient for the trained weights if any."""


_control: tuple[Any, Any] | None = None


def control_group() -> Any:
    """A process group of its own, so that its messages never mix with a reducer's; None if alone.

    The first call creates it, on all ranks together.
    """
    global _control
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    if _control is None or _control[0] is not dist.group.WORLD:
        _control = (dist.group.WORLD, dist.new_group())
    return _control[1]


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum over all ranks, in place."""
    group = control_group()
    if group is not None:
        dist.all_reduce(tensor, group=group)
    return tensor


def num_ranks() -> int:
    """Ranks that share a batch."""
    return 1 if control_group() is None else dist.get_world_size()


class Noted(torch.autograd.Function):
    """``Noted.apply(total, losses, weighting)``: ``total``; its backward notes ``losses`` (K,)."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, losses: Tensor, weighting: Weighting) -> Tensor:
        ctx.losses, ctx.weighting = losses, weighting
        return total.view_as(total)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ctx.weighting.note(ctx.losses, grad.detach())
        return grad, None, None


class Rotate(torch.autograd.Function):
    """``Rotate.apply(rows, tangents, raw, matrices, weighting)``: the K rotated features.

    rows (N, d), tangents packed, raw (K,) or None, matrices (K, m, m); returns K tensors like rows.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        tangents: Tensor,
        raw: Tensor | None,
        matrices: Tensor,
        weighting: Weighting,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(matrices, *([rows] if weighting.coop_enabled else []))
        ctx.weighting, ctx.shape, ctx.dtype, ctx.spent = weighting, rows.shape, rows.dtype, False
        ctx.features = rows if weighting.exact_accumulation else None
        control_group()
        return tuple(rotate(rows, matrices))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.spent:
            raise RuntimeError(
                "the features of this forward have had their backward: the tasks' gradients are "
                "needed together, so sum the losses and call backward once"
            )
        ctx.spent = True
        matrices, *kept = ctx.saved_tensors
        with torch.autocast(matrices.device.type, enabled=False):
            return _backward(ctx, grads, matrices, kept[0] if kept else None)


def _backward(
    ctx: Any, grads: Sequence[Tensor | None], matrices: Tensor, rows: Tensor | None
) -> tuple[Tensor | None, ...]:
    weighting: Weighting = ctx.weighting
    gradients = _unrotate(grads, matrices, ctx.shape)
    before = None
    if weighting.measure_before_rotation:
        before = _gram(_unrotate(grads, torch.eye(len(matrices[0])).to(matrices), ctx.shape))
    statistics = _reduce(gradients, before, weighting.given_losses())
    window = weighting.open_window()
    every = gradients
    if window is not None:
        statistics, every, rows = window.extend(statistics, gradients, rows)
    weights, raw_grad = weighting.weigh(statistics)
    tangent_grad = None
    if ctx.needs_input_grad[1]:
        tangent_grad = _tangent_gradient(every, rows, statistics, matrices.shape[-1])
    if window is not None:
        tangent_grad = window.rest("tangents", tangent_grad)
        raw_grad = window.rest("raw", raw_grad)
        if ctx.needs_input_grad[0]:
            window.correct(weights, ctx.features, gradients)
    rows_grad = None
    if ctx.needs_input_grad[0]:
        rows_grad = (weights.to(gradients) @ gradients.flatten(1)).view(ctx.shape).to(ctx.dtype)
    return rows_grad, tangent_grad, raw_grad if ctx.needs_input_grad[2] else None, None, None


def _tangent_gradient(
    gradients: Tensor, rows: Tensor | None, statistics: Statistics, size: int
) -> Tensor:
    """Packed, this rank's gradient for X; with ``rows`` (N, d), the features, in cooperation."""
    directions = _directions(gradients, statistics)
    if rows is None:
        return pack(_products(gradients, directions, size)).neg_()
    own = _products(gradients, rows.to(gradients), size)
    return pack(_cooperate(own, gradients, directions, statistics))


def _unrotate(grads: Sequence[Tensor | None], matrices: Tensor, shape: torch.Size) -> Tensor:
    """(K, N, d), G_k = Gr_k R_k; zeros for an absent task."""
    size = matrices.shape[-1]
    result = matrices.new_empty(len(grads), *shape)
    for grad, matrix, out in zip(grads, matrices.expand(len(grads), -1, -1), result, strict=True):
        if grad is None:
            out.zero_()
            continue
        grad = grad.to(result.dtype)
        if size == shape[1]:
            torch.mm(grad, matrix, out=out)
        else:
            out[:, :size] = grad[:, :size] @ matrix
            out[:, size:] = grad[:, size:]
    return result


def _gram(gradients: Tensor) -> Tensor:
    flat = gradients.flatten(1)
    return flat @ flat.mT


def _reduce(gradients: Tensor, before: Tensor | None, losses: Tensor | None) -> Statistics:
    """Inner products, losses and the number of rows of the global batch, in one all-reduce."""
    num_tasks, num_rows, _ = gradients.shape
    gram = _gram(gradients)
    if num_ranks() == 1:
        return Statistics(gram, losses, gram.new_tensor(num_rows), 1, before)
    parts = [gram, gram.new_tensor([num_rows])]
    parts += [part.to(gram) for part in (before, losses) if part is not None]
    total = sum_over_ranks(torch.cat([part.flatten() for part in parts]))
    pieces = list(total.split([part.numel() for part in parts]))
    world_size = num_ranks()
    grams = [pieces[0], *(pieces[2:3] if before is not None else [])]
    grams = [piece.view(num_tasks, num_tasks) / world_size**2 for piece in grams]
    return Statistics(
        gram=grams[0],
        losses=pieces[-1] / world_size if losses is not None else None,
        num_rows=pieces[1][0],
        world_size=world_size,
        gram_before=grams[1] if before is not None else None,
    )


def _directions(gradients: Tensor, statistics: Statistics) -> Tensor:
    """(N, d), V of the top of this file: this rank's rows."""
    factors = statistics.inverse_norms * statistics.num_rows.sqrt()
    factors /= statistics.num_present * statistics.world_size
    return (factors @ gradients.flatten(1)).view(gradients.shape[1:])


def _products(gradients: Tensor, rows: Tensor, size: int) -> Tensor:
    """(K, m, m), G_k^T rows, of the first m features."""
    return gradients[..., :size].mT @ rows[:, :size]


def _cooperate(
    own: Tensor, gradients: Tensor, directions: Tensor, statistics: Statistics
) -> Tensor:
    """(K, m, m), ||(h1 + h2) / 2|| (h1 / ||h1|| + h2 / ||h2||) for each task.

    h1 is the gradient of the task's own loss for its rotation matrix, h2 the one that aligns;
    without the division the first drowns the second. As in the last version of the package that had
    this, 0.1.4, h2 is that of ||R_k v_n - gr_kn||^2 / 2 with v scaled to ||V|| = m: on rotations
    this differs by a constant from what is minimised else, so that only the lengths do.

    Args:
        own: h1 of this rank.
        gradients: (K, N, d), G_k of this rank.
        directions: (N, d), V of this rank.
        statistics: of the global batch.
    """
    size, world_size = own.shape[-1], statistics.world_size
    mean_norm = statistics.gram.sum().clamp(min=0).sqrt() / statistics.num_present
    rows = directions[:, :size]
    inner = rows.mT @ rows * (world_size * mean_norm / statistics.num_rows.sqrt())
    both = torch.stack([own, inner - _products(gradients, directions, size)])
    both = sum_over_ranks(both) / world_size
    norms = torch.linalg.matrix_norm(both, keepdim=True)
    length = torch.linalg.matrix_norm(both.mean(0), keepdim=True)
    return length * (both * inverse(norms)).sum(0)
