"""Several tasks on one backbone whose gradients conflict: RotoGrad, and what to compare it with.

.. code-block:: python

    model = RotoGrad(backbone, [head1, head2], size_z)
    optimizer = torch.optim.Adam(model.param_groups(lr=1e-3, lr_rotation=5e-4))
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for inputs, labels1, labels2 in loader:
        prediction1, prediction2 = model(inputs)
        losses = [loss_fn1(prediction1, labels1), loss_fn2(prediction2, labels2)]
        accelerator.backward(total(model, losses))  # sum(losses) does, except for RotoGradNorm
        optimizer.step()
        optimizer.zero_grad()

Losses are means over the batch. With gradient accumulation, norms are those of a micro-batch, and
steps are counted when the optimizer steps.

Source: Javaloy and Valera, RotoGrad: Gradient Homogenization in Multitask Learning,
arXiv 2103.02631, and the behaviour of their package ``rotograd``.
"""

from toolkit.rotograd.balancing import RotoGrad, RotoGradNorm
from toolkit.rotograd.multitask import VanillaMTL, total
from toolkit.rotograd.rotating import RotateOnly
from toolkit.rotograd.steps import cached

__all__ = ["RotateOnly", "RotoGrad", "RotoGradNorm", "VanillaMTL", "cached", "total"]
