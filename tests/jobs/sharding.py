"""FSDP2 in a test's job: two ways to shard a model on the CPU, and faults in what gathers it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from tests.oracle import NUM_FEATURES, Case, build_optimizer
from toolkit.bridge import accumulation, donor, gradient_sums, injection, job
from toolkit.bridge.transport import DirectoryTransport
from toolkit.sharding import full_tensor, is_sharded, local_tensor, shard_like

ROLES = {"h1": "receiver", "h2": "donor"}
# As configuration files of the launcher would have them: every layer a unit of its own, or all one.
BY_LAYER: dict[str, Any] = {
    "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "transformer_cls_names_to_wrap": ["Linear"],
    "cpu_ram_efficient_loading": True,
}
WHOLE: dict[str, Any] = {"auto_wrap_policy": "NO_WRAP", "cpu_ram_efficient_loading": False}
SETTINGS = {"receiver": {**BY_LAYER, "activation_checkpointing": True}, "donor": WHOLE}


def is_asked_for(case: Case, head: str) -> bool:
    """Whether the job that trains ``head`` is sharded in this case."""
    return case.sharded in (ROLES[head], "both")


@contextlib.contextmanager
def fsdp2(accelerator: Accelerator, **settings: Any) -> Iterator[None]:
    """For its length, Accelerate does on the CPU what it does on GPUs with these settings.

    By itself it makes DistributedDataParallel of an FSDP2 configuration there.
    """
    before = accelerator.distributed_type
    set_type(accelerator, DistributedType.FSDP)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, **settings)
    if accelerator.mixed_precision != "no":
        plugin.set_mixed_precision(accelerator.mixed_precision)
    accelerator.state.fsdp_plugin = plugin
    yield
    set_type(accelerator, before)
    del accelerator.state.fsdp_plugin


def set_type(accelerator: Accelerator, distributed_type: DistributedType) -> None:
    """Let Accelerate take its present ranks for these."""
    for state in (PartialState(), accelerator.state):  # new instances copy the first one's
        state.distributed_type = distributed_type


def shard(
    accelerator: Accelerator, case: Case, network: nn.Module
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The network, sharded by Accelerate or by hand, with its prepared optimizer.

    By hand, one bias stays whole, so that nobody but the bridge reduces its gradient.
    """
    if case.prepared:
        model, optimizer = accelerator.prepare(network, build_optimizer(case, network))
        assert isinstance(model, FSDPModule), "Accelerate has not sharded the model"
    else:
        mesh = init_device_mesh("cpu", (accelerator.num_processes,))
        for name in ("backbone.0", "heads.h2"):
            fully_shard(network.get_submodule(name), mesh=mesh)
        model = network
        optimizer = accelerator.prepare(build_optimizer(case, model))
    evaluate(model, torch.zeros(2, NUM_FEATURES, dtype=getattr(torch, case.dtype)), "h2")
    return model, optimizer


@torch.no_grad()
def evaluate(model: nn.Module, features: Tensor, head: str) -> None:
    """A forward without a backward, after which FSDP2 may keep whole copies of parameters."""
    model(features, head)


def full_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, whole. A collective where they are sharded."""
    return {name: full_tensor(tensor).contiguous() for name, tensor in tensors.items()}


# -- deliberate faults ----------------------------------------------------------------------------

_publish = DirectoryTransport.publish
_reduce_unmanaged = accumulation.WindowAccumulator.reduce_unmanaged_


def _own_shard_only(tensor: Tensor) -> Tensor:
    """The whole tensor but for what the other ranks hold."""
    if not is_sharded(tensor):
        return tensor
    full, part = torch.zeros_like(full_tensor(tensor)), local_tensor(tensor)
    full[: len(part)] = part  # right on the first rank, which publishes
    return full


def _reduce_twice(self: accumulation.WindowAccumulator, parameters: Any) -> None:
    """Take the mean over ranks of what FSDP2 has averaged already."""
    parameters = list(parameters)
    _reduce_unmanaged(self, parameters)
    for _, parameter in parameters:
        if is_sharded(parameter) and parameter.grad is not None:
            local_tensor(parameter.grad).div_(self._accelerator.num_processes)


def _shard_of_another_rank(tensor: Tensor, like: Tensor) -> Tensor:
    """Split the other way round: every rank takes the part of another."""
    return shard_like(tensor.flip(0), like)


def half_of(write: Callable[[Path], object]) -> Callable[[Path], None]:
    """Write, and lose the second half."""

    def write_half(path: Path) -> None:
        write(path)
        os.truncate(path, path.stat().st_size // 2)

    return write_half


def _torn_weights(
    self: DirectoryTransport, job: str, sequence: int, write: Callable[[Path], object]
) -> int:
    """Not a wrong bridge but a bad disk: the donor cannot read the weights of one step."""
    is_torn = (job, sequence) == ("receiver", 2)
    return _publish(self, job, sequence, half_of(write) if is_torn else write)


MUTATIONS: dict[str, tuple[Any, str, Any]] = {
    "donor_gathers_one_shard": (gradient_sums, "full_tensor", _own_shard_only),
    "receiver_gathers_one_shard": (job, "full_tensor", _own_shard_only),
    "reduce_twice": (accumulation.WindowAccumulator, "reduce_unmanaged_", _reduce_twice),
    "shard_of_another_rank": (injection, "shard_like", _shard_of_another_rank),
    "stale_copies": (donor, "reshard", lambda model: None),
    "torn_weights": (DirectoryTransport, "publish", _torn_weights),
}
