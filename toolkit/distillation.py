"""Losses that draw a student's outputs to a teacher's on the same inputs.

References: Hinton, Vinyals, Dean, Distilling the Knowledge in a Neural Network, 2015, arXiv
1503.02531 (softened classes); Anil et al., Large scale distributed neural network training through
online distillation, 2018, arXiv 1804.03235 (a teacher that is itself in training).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Reduction = Literal["mean", "sum"]


def kl_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """``T^2 KL(softmax(teacher / T) || softmax(student / T))``.

    The square keeps the gradient's size where ``T`` changes (Hinton et al., section 2.1). With two
    teachers the mean of their losses has the gradient of one that predicts their mean.

    Args:
        student_logits: (..., K) over K classes; every leading index is a sample.
        teacher_logits: the same shape, on the same inputs; gets no gradient.
        temperature: ``T``, positive; above 1 the small probabilities count for more.
        reduction: over samples. No samples give 0 in both cases.

    Returns:
        A scalar, in float32 for logits in half precision.

    Raises:
        ValueError: for unlike shapes, fewer than two dimensions, or a temperature not positive.
    """
    _check(student_logits, teacher_logits)
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    student, teacher = _widened(student_logits, teacher_logits)
    divergence = F.kl_div(
        F.log_softmax(student / temperature, dim=-1),
        F.log_softmax(teacher / temperature, dim=-1),
        reduction="sum",
        log_target=True,
    )
    return _reduced(divergence * temperature**2, student_logits, reduction)


def mse_loss(
    student_outputs: Tensor, teacher_outputs: Tensor, reduction: Reduction = "mean"
) -> Tensor:
    """The squared difference, its mean over the last dimension.

    Args:
        student_outputs: (..., K); every leading index is a sample.
        teacher_outputs: the same shape, on the same inputs; gets no gradient.
        reduction: over samples. No samples give 0 in both cases.

    Returns:
        A scalar, in float32 for outputs in half precision.

    Raises:
        ValueError: for unlike shapes, or fewer than two dimensions.
    """
    _check(student_outputs, teacher_outputs)
    student, teacher = _widened(student_outputs, teacher_outputs)
    return _reduced((student - teacher).square().mean(dim=-1).sum(), student_outputs, reduction)


def _check(student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise ValueError(
            f"shape mismatch: the student gives {tuple(student.shape)}, the teacher "
            f"{tuple(teacher.shape)}"
        )
    if student.dim() < 2:
        raise ValueError(
            f"outputs must have samples first and classes (or targets) last, got shape "
            f"{tuple(student.shape)}; add a dimension of size 1 for a single target"
        )


def _widened(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(student.dtype, torch.float32)
    return student.to(dtype), teacher.detach().to(dtype)


def _reduced(total: Tensor, outputs: Tensor, reduction: Reduction) -> Tensor:
    if reduction == "sum":
        return total
    return total / max(outputs.shape[:-1].numel(), 1)
