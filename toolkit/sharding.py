"""Tensors that FSDP2 (``torch.distributed.fsdp.fully_shard``) has split over the ranks of a job.

A sharded parameter is a DTensor: its shape is that of the whole tensor, and each rank holds a part.
Its gradient, after a synchronised backward, is a DTensor too: the mean over the ranks, as
DistributedDataParallel gives it. A tensor that is not sharded passes through here as it is.

``torch.distributed.fsdp`` takes half as long to import as all of torch. Who has sharded anything
has imported it; where nobody has, nothing is sharded.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TypeGuard

from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
    from torch.distributed.tensor import DTensor


def is_sharded(tensor: Tensor | None) -> bool:
    """Whether the ranks hold parts of the tensor."""
    return _is_dtensor(tensor)


def _is_dtensor(tensor: Tensor | None) -> TypeGuard[DTensor]:
    return _is_of("torch.distributed.tensor", "DTensor", tensor)


def _is_fsdp(module: nn.Module) -> TypeGuard[FSDPModule]:
    return _is_of("torch.distributed.fsdp", "FSDPModule", module)


def _is_fsdp1(module: nn.Module) -> TypeGuard[FullyShardedDataParallel]:
    return _is_of("torch.distributed.fsdp", "FullyShardedDataParallel", module)


def _is_of(module: str, name: str, thing: object) -> bool:
    """Whether a thing is of a class of a module that may not have been imported."""
    return isinstance(thing, getattr(sys.modules.get(module), name, ()))


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole tensor, on every rank. A collective if it is sharded."""
    return tensor.full_tensor() if _is_dtensor(tensor) else tensor


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's part of the tensor, which may be empty."""
    return tensor.to_local() if _is_dtensor(tensor) else tensor


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Split a whole tensor as ``like`` is split; nothing is sent between ranks.

    Args:
        tensor: the same values on every rank.
        like: of the same shape.

    Returns:
        A DTensor on the device of ``like``; ``tensor`` itself where ``like`` is not sharded.
    """
    if _is_dtensor(like):
        from torch.distributed.tensor import DTensor, Replicate

        mesh = like.device_mesh
        replicated = [Replicate()] * mesh.ndim
        whole = DTensor.from_local(tensor.to(like.device), mesh, replicated, run_check=False)
        return whole.redistribute(placements=like.placements)
    return tensor


def reshard(model: nn.Module) -> None:
    """Free the whole parameters that FSDP2 may have kept after a forward without a backward.

    Until then the modules hold them in place of their shards, and a forward would use them, and
    not see what has been written to the shards meanwhile.
    """
    for module in model.modules():
        if _is_fsdp(module):
            module.reshard()


def check_sharding(model: nn.Module, num_processes: int) -> None:
    """Refuse a model whose gradients are not whole, or the mean of as many as there are ranks.

    Args:
        model: resharded, see :func:`reshard`.
        num_processes: ranks of the job.

    Raises:
        ValueError: naming the parameter or the module, and the remedy.
    """
    in_fsdp: set[int] = set()
    for name, module in model.named_modules():
        parameters = map(id, module.parameters())
        if _is_fsdp1(module):
            raise ValueError(
                f"module {name!r} is FullyShardedDataParallel (FSDP1), which flattens parameters: "
                "use FSDP2 (torch.distributed.fsdp.fully_shard, fsdp_version: 2)"
            )
        if _is_fsdp(module):
            in_fsdp.update(parameters)
            if (factor := _divide_factor(module)) not in (None, num_processes):
                raise ValueError(
                    f"module {name!r} divides its gradients by {factor}, and not by the "
                    f"{num_processes} ranks: leave out set_gradient_divide_factor()"
                )
    sharded = {name: p for name, p in model.named_parameters() if _is_dtensor(p)}
    for name, parameter in sharded.items():
        if id(parameter) not in in_fsdp:
            raise ValueError(
                f"parameter {name!r} is a DTensor that fully_shard() does not manage (tensor "
                "parallel?): nobody takes the mean of its gradient. Use FSDP2, or whole parameters"
            )
        if parameter.device_mesh.ndim != 1 or parameter.device_mesh.size() != num_processes:
            raise ValueError(
                f"parameter {name!r} lies on a device mesh of shape "
                f"{tuple(parameter.device_mesh.mesh.shape)}: only one dimension with all "
                f"{num_processes} ranks is supported, no hybrid, tensor or context parallel. Call "
                f"fully_shard(..., mesh=init_device_mesh(device_type, ({num_processes},)))"
            )
        if parameter.device.type != parameter.device_mesh.device_type:
            raise ValueError(
                f"parameter {name!r} is offloaded to device {parameter.device.type}: a gradient "
                "from elsewhere cannot be put there. Leave out CPUOffloadPolicy "
                "(fsdp_offload_params)"
            )


def _divide_factor(module: FSDPModule) -> object:
    """What ``set_gradient_divide_factor`` has set; torch has no public way to ask.

    Where torch is too old for it, ``set_reduce_scatter_divide_factor`` has set an operation.
    """
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
    names = "gradient_divide_factor", "reduce_scatter_reduce_op"
    factors = (getattr(group, name, None) for group in groups for name in names)
    return next((factor for factor in factors if factor is not None), None)
