"""What the graph of a tensor tells before its backward."""

from __future__ import annotations

from torch import Tensor


def has_reentrant_checkpoint(tensor: Tensor) -> bool:
    """Whether a part of the graph is hidden from a backward that names its inputs.

    ``torch.utils.checkpoint`` with ``use_reentrant=True`` runs a backward of its own, which adds to
    the ``.grad`` of all parameters and returns the gradient of none.
    """
    nodes, seen = [tensor.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        if node.name() == "CheckpointFunctionBackward":
            return True
        seen.add(node)
        nodes += [following for following, _ in node.next_functions]
    return False
