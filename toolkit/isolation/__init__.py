"""Two models, one feeding the other, each trained by its own loss and its own optimizer.

``model2(inputs)`` is the input of ``model1``. ``loss1`` is to train ``model1`` only, ``loss2``
``model2`` only, and the graph of ``loss2`` runs through both. One step, with one forward of
``model2`` for both losses::

    cut = CutPoint(model2(inputs), model2)
    backward_for(loss1(model1(cut.detached)), model1, accelerator)
    optimizer1.step()
    optimizer1.zero_grad()
    with accelerator.no_sync(model1):
        output = model1(cut.attached)
    cut.backward(loss2(output), accelerator)
    optimizer2.step()
    optimizer2.zero_grad()

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
