"""Sharding on a mesh of one rank, in this process; two ranks are in ``tests/distributed``."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.nn import functional as F

from tests.oracle import Case, Network, build_network
from tests.unit.jobs import batches
from toolkit import BridgeConfig, GradientDonor, GradientReceiver
from toolkit.bridge.errors import BridgeError
from toolkit.bridge.frozen_state import FrozenOptimizerState
from toolkit.sharding import check_sharding, full_tensor, is_sharded, reshard


@pytest.fixture
def mesh(fresh_state: None, one_rank: None) -> DeviceMesh:
    """One dimension with one rank."""
    return init_device_mesh("cpu", (1,))


def sharded_network(mesh: DeviceMesh, heads: tuple[str, ...] = ("h1", "h2")) -> Network:
    """All of it one unit, which keeps its whole parameters after a forward."""
    network = build_network(Case(), heads)
    if "h1" in heads:
        network.heads["h2"].requires_grad_(False)
    fully_shard(network, mesh=mesh)
    return network


def refuses(model: nn.Module, message: str, num_processes: int = 1) -> None:
    with pytest.raises(ValueError, match=message):
        check_sharding(model, num_processes)


def test_what_is_sharded_right_and_what_is_not_sharded_is_taken(mesh: DeviceMesh) -> None:
    check_sharding(sharded_network(mesh), 1)
    check_sharding(build_network(Case()), 7)


@pytest.mark.filterwarnings("ignore:FSDP is switching to use:UserWarning")  # one rank
def test_that_fsdp1_is_refused(mesh: DeviceMesh) -> None:
    flat = FullyShardedDataParallel(nn.Linear(3, 2), device_id=torch.device("cpu"))
    refuses(flat, r"FullyShardedDataParallel \(FSDP1\).* use FSDP2")


def divide_by_four(network: Any) -> None:
    """Take another mean than that over the ranks; in old torch, NCCL alone can."""
    if hasattr(network, "set_gradient_divide_factor"):
        network.set_gradient_divide_factor(4.0)
    else:
        network._get_fsdp_state()._fsdp_param_group.reduce_scatter_reduce_op = dist.ReduceOp.SUM


def test_that_another_mean_than_over_the_ranks_is_refused(mesh: DeviceMesh) -> None:
    network = sharded_network(mesh)
    divide_by_four(network)
    refuses(network, r"divides its gradients by .*, and not by the 1 ranks: leave out")


def test_that_other_meshes_are_refused(mesh: DeviceMesh) -> None:
    refuses(sharded_network(mesh), r"mesh of shape \(1,\): only one dimension with all 2", 2)
    hybrid = nn.Linear(3, 2)
    names = ("replicate", "shard")
    fully_shard(hybrid, mesh=init_device_mesh("cpu", (1, 1), mesh_dim_names=names))
    refuses(hybrid, r"'weight' lies on a device mesh of shape \(1, 1\).* no hybrid")


def test_that_parameters_on_another_device_than_their_mesh_are_refused(mesh: DeviceMesh) -> None:
    """As CPUOffloadPolicy has them beside a GPU."""
    elsewhere = nn.Linear(3, 2, device="meta")
    fully_shard(elsewhere, mesh=mesh)
    refuses(elsewhere, r"'weight' is offloaded to device meta: .* Leave out CPUOffloadPolicy")


def test_that_a_tensor_nobody_reduces_is_refused(mesh: DeviceMesh) -> None:
    model = nn.Linear(3, 2)
    model.weight = nn.Parameter(distribute_tensor(model.weight.detach(), mesh, [Replicate()]))
    refuses(model, r"'weight' is a DTensor that fully_shard\(\) does not manage")


def test_that_whole_copies_after_a_forward_are_freed(mesh: DeviceMesh) -> None:
    network = sharded_network(mesh)
    with torch.no_grad():
        network(torch.zeros(1, 6).double(), "h1")
    assert not any(map(is_sharded, network.parameters())), "this test says nothing"
    reshard(network)
    assert all(map(is_sharded, network.parameters()))


# -- on the bridge --------------------------------------------------------------------------------


def prepared(mesh: DeviceMesh, **settings: Any) -> tuple[Accelerator, Network, Any]:
    """A receiver's accelerator, sharded network and optimizer."""
    accelerator = Accelerator(cpu=True, **settings)
    network = sharded_network(mesh)
    return accelerator, network, accelerator.prepare(torch.optim.AdamW(network.parameters()))


def test_that_the_bridge_refuses_with_the_reason(mesh: DeviceMesh, tmp_path: Path) -> None:
    accelerator, network, optimizer = prepared(mesh)
    divide_by_four(network)
    with pytest.raises(BridgeError, match="divides its gradients by"):
        GradientReceiver(accelerator, network, optimizer, BridgeConfig(runs_dir=tmp_path / "runs"))


def test_that_a_backward_that_is_never_reduced_is_noticed(mesh: DeviceMesh, tmp_path: Path) -> None:
    accelerator, network, optimizer = prepared(mesh)
    config = BridgeConfig(runs_dir=tmp_path / "runs", peer_wait=0.1)
    with GradientReceiver(accelerator, network, optimizer, config) as receiver:
        network.set_requires_gradient_sync(False)  # type: ignore[operator]
        inputs, labels = next(batches("h1", [5]))
        receiver.backward(F.cross_entropy(network(inputs, "h1"), labels), num_samples=5)
        with pytest.raises(RuntimeError, match="FSDP2 has reduced no gradient"):
            receiver.inject()


def test_that_a_checkpoint_of_one_shard_is_refused(mesh: DeviceMesh, tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    network = sharded_network(mesh, ("h2",))
    optimizer = accelerator.prepare(torch.optim.AdamW(network.parameters()))
    config = BridgeConfig(runs_dir=tmp_path / "runs")
    with (
        GradientDonor(accelerator, network, optimizer, config),
        pytest.raises(RuntimeError, match="rank 0's shards only"),
    ):
        accelerator.save_state(str(tmp_path / "checkpoint"))


@pytest.mark.parametrize("fused", [False, True])
def test_that_the_state_of_frozen_parameters_comes_back(mesh: DeviceMesh, fused: bool) -> None:
    networks = [sharded_network(mesh) for _ in range(2)]
    heads = [dict(network.heads["h2"].named_parameters()) for network in networks]
    optimizers = [torch.optim.AdamW(net.parameters(), fused=fused) for net in networks]

    def step(number: int) -> None:
        for parameter in heads[number].values():
            parameter.grad = torch.full_like(parameter, 0.5)
        optimizers[number].step()

    states = [
        FrozenOptimizerState(optimizer, head)
        for optimizer, head in zip(optimizers, heads, strict=True)
    ]
    assert states[1].state_dict() == {}
    step(0)
    content = copy.deepcopy(states[0].state_dict())  # a checkpoint shares no memory
    assert not any(is_sharded(value) for state in content.values() for value in state.values())
    networks[1].load_state_dict(networks[0].state_dict())
    states[1].load_state_dict(content)
    step(0)
    step(1)
    for name, parameter in heads[0].items():
        assert torch.equal(full_tensor(parameter), full_tensor(heads[1][name]))
