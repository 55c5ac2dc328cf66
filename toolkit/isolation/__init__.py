"""Two models, one feeding the other, each trained by its own loss and its own optimizer.

``model2(inputs)`` is the input of ``model1``. ``loss1`` is to train ``model1`` only, ``loss2``
``model2`` only, and the graph of ``loss2`` runs through both. With one forward of
``model2`` for both losses:

.. code-block:: python

    check_disjoint(critic=(model1, optimizer1), generator=(model2, optimizer2))
    for latents, real in dataloader:
        with accelerator.accumulate(model1, model2), one_loss_scale(accelerator):
            cut = CutPoint(model2(latents), model2)
            with no_leak(model2, optimizer2):  # for tests and first steps: it copies model2
                loss1 = model1(cut.detached).mean() - model1(real).mean()
                backward_for(loss1, model1, accelerator)
            optimizer1.step()
            optimizer1.zero_grad()
            with accelerator.no_sync(model1):  # no gradient of model1 will come
                loss2 = -model1(cut.attached).mean()
            cut.backward(loss2, accelerator)
            optimizer2.step()
            optimizer2.zero_grad()

``check_disjoint`` names the parameters that two optimizers share, ``no_leak`` each value, gradient,
buffer and optimizer state that moved and should not have.

The order matters. A forward of ``model1`` from before ``optimizer1.step()`` cannot serve a backward
after it: if both losses are to see the same ``model1``, do both backwards and then both steps.
``model1(cut.attached)`` can then serve both losses too, with ``retain_graph=True`` in the first
backward.

Under DistributedDataParallel, one forward of a model allows one backward for it: sum the losses. A
second one would leave the gradients of the ranks apart, without any error. ``no_sync`` says that no
gradient of ``model1`` will follow this forward. Without it, the next gradient of an accumulation
window is sent a step too early and once more in time: the same but for its rounding.

Modelled on ``GradientsParams::from_grads(grads, &model)`` of the Burn framework, which picks one
model's gradients out of a backward pass; here nothing else is computed in the first place.
"""

from toolkit.isolation.checks import LeakError, check_disjoint, no_leak
from toolkit.isolation.gradients import CutPoint, backward_for, one_loss_scale

__all__ = [
    "CutPoint",
    "LeakError",
    "backward_for",
    "check_disjoint",
    "no_leak",
    "one_loss_scale",
]
