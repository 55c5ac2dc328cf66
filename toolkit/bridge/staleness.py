"""What becomes of a donor's gradient that was taken at weights some receiver steps old.

A payload holds the sum S over n samples of the gradient at ``theta_then``; by now the receiver has
``theta_now``, ``age`` of its steps later. Payloads older than ``max_staleness`` are dropped before
they come here. A payload of age 0 is applied as it is by every rule:

- ``apply``: S, as if it were new.
- ``damp``: S / (1 + age), see :func:`damping`.
- ``compensate``, ``compensate_adaptive``: S and a first-order estimate of what it has changed by,
  see :func:`compensate`.

The samples count in full under every rule: were n damped too, S/n would be what it was. So damping
is a smaller weight of the donor's loss, while compensation leaves the joint loss as it is.

There is no rule that drops all payloads of age 1 or more: ``max_staleness=0`` takes fresh ones
only, and waits for them. Not to wait would leave a donor that is slower without any part.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from toolkit.parameters import SharedParameters

COMPENSATION = {"compensate": 0.04, "compensate_adaptive": 2.0}  # lambda where none is given


def damping(age: int) -> float:
    """1 / (1 + age): the factor of a payload under rule ``damp``.

    Descent on a quadratic of curvature h by gradients that are always ``age`` steps old,
    ``x[k+1] = x[k] - r h x[k-age]``, converges for learning rates r below
    ``2 sin(pi / (4 age + 2)) / h`` (Levin and May 1976): 2/h for fresh gradients, 1/h for age 1,
    pi/2 / (age h) for old ones. Dividing by 1 + age follows this bound, up to a factor of pi/4 for
    old ones. Zhang et al. divide the learning rate by the staleness itself; here an age of 1 is
    damped already, and 0 needs no rule of its own.

    Args:
        age: receiver steps between the weights of the payload and the present ones.

    References:
        Zhang, Gupta, Lian and Liu, Staleness-aware Async-SGD for Distributed Deep Learning, 2016,
        arXiv 1511.05950. Levin and May, A note on difference-delay equations, 1976.
    """
    return 1.0 / (1 + age)


def compensate(
    sums: Mapping[str, Tensor],
    count: float,
    weights: Mapping[str, tuple[Tensor, Tensor]],
    strength: float,
    adaptive: bool,
) -> dict[str, Tensor]:
    """Delay compensation: the gradient sum that is expected at the present weights.

    To first order the mean gradient at ``theta_now`` is ``g + H (theta_now - theta_then)``, g and
    H being gradient and Hessian of the mean loss at ``theta_then``. DC-ASGD puts lambda g*g,
    element by element, in the place of H: for a likelihood the squares of the gradient estimate
    the diagonal of the Fisher information. With ``g = S/n`` the sum over n samples is
    ``n (g + lambda g*g (theta_now - theta_then))``, that is

        S + lambda/n S*S (theta_now - theta_then)

    with a constant lambda, in units of one over the mean loss. The adaptive form divides lambda by
    the root of a moving average of g*g. Taken without its past, so that no state needs to be kept
    for each donor, that is ``lambda / |g|``, and n cancels:

        S + lambda |S| (theta_now - theta_then)

    with lambda in units of one over a weight. It does not depend on the scale of the loss.

    Args:
        sums: S by name, like the parameters in device and sharding; left as they are.
        count: n, the samples in the sums.
        weights: ``(theta_now, theta_then)`` by name. A name that is absent has not changed.
        strength: lambda.
        adaptive: the second form.

    Reference:
        Zheng et al., Asynchronous Stochastic Gradient Descent with Delay Compensation, 2017,
        arXiv 1609.08326: DC-ASGD-c and, with m = 0 and epsilon = 0, DC-ASGD-a.
    """

    def compensated(total: Tensor, now: Tensor, then: Tensor) -> Tensor:
        if adaptive:
            return torch.addcmul(total, total.abs(), now - then, value=strength)
        return torch.addcmul(total, total.square(), now - then, value=strength / count)

    return {
        name: compensated(total, *weights[name]) if name in weights else total
        for name, total in sums.items()
    }


class WeightHistory:
    """The shared weights of the receiver's newest steps, to compare the present ones with.

    Every rank keeps what it holds of the parameters that are trained, where they are: the whole of
    them, or its shard. That takes ``max_staleness + 1`` times their memory.

    Args:
        shared: the parameters.
        max_staleness: receiver steps that a payload may be old; with 0 nothing is kept.
    """

    def __init__(self, shared: SharedParameters, max_staleness: int) -> None:
        self._shared, self._max_staleness = shared, max_staleness
        self._versions: dict[int, dict[str, Tensor]] = {}

    @torch.no_grad()
    def remember(self, receiver_step: int) -> None:
        """Keep the present weights, those after ``receiver_step`` steps; forget the too old ones.

        After a step that a loss scaler skipped they are kept once more, and nothing is forgotten.
        """
        if not self._max_staleness:
            return
        spare = self._versions.pop(receiver_step, {})
        for step in [s for s in self._versions if s < receiver_step - self._max_staleness]:
            spare = self._versions.pop(step)  # new memory takes longer to get than to fill
        self._versions[receiver_step] = {
            name: spare[name].copy_(parameter) if name in spare else parameter.detach().clone()
            for name, parameter in self._shared.trained.items()
        }

    def clear(self) -> None:
        """Forget all: other weights have been loaded."""
        self._versions.clear()

    def since(self, receiver_step: int, head: str) -> dict[str, tuple[Tensor, Tensor]] | None:
        """``(theta_now, theta_then)`` of the backbone and one head, by name of what may differ.

        Args:
            receiver_step: completed steps of the receiver then.
            head: name of the head's module.

        Returns:
            Tensors like the parameters, without those that were frozen then, and none at all if
            these are the present weights; None if that version is not kept.
        """
        then = self._versions.get(receiver_step)
        if then is None:
            return None
        if receiver_step == max(self._versions):
            return {}
        now = self._shared.backbone | self._shared.heads[head]
        return {name: (p.detach(), then[name]) for name, p in now.items() if name in then}
