"""What freezing refuses, and that nothing has changed when it has."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from tests.frozen_cases import REST, Net, batches, build_net, differences, squared_error
from toolkit.freezing import freeze, frozen, unfreeze

pytestmark = pytest.mark.usefixtures("fresh_state")


@dataclasses.dataclass
class Job:
    """A model in the middle of its training, with gradients and moments."""

    net: Net = dataclasses.field(default_factory=build_net)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=0.1)
        self.step()
        self.backward()

    def backward(self) -> None:
        for first, second, wanted in batches(1, seed=1):
            squared_error(self.net(first, second), wanted).backward()

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.backward()
        self.optimizer.step()


def everything(job: Job) -> dict[str, Any]:
    """All that freezing touches: tensors, gradients, state, flags, modes and hooks."""
    found: dict[str, Any] = {}
    for name, parameter in job.net.named_parameters():
        hooks = len(getattr(parameter, "_post_accumulate_grad_hooks", None) or {})
        grad = None if parameter.grad is None else parameter.grad.clone()
        found[name] = parameter.detach().clone()
        found[f"{name} flags"] = (parameter.requires_grad, hooks, grad is None)
        found[f"{name} gradient"] = torch.zeros(()) if grad is None else grad
        for key, value in job.optimizer.state[parameter].items():
            found[f"{name} {key}"] = value.clone()
    for name, module in job.net.named_modules():
        found[f"module {name}"] = (module.training, len(module._forward_pre_hooks))
    step_hooks = len(job.optimizer._optimizer_step_pre_hooks)
    buffers = {name: buffer.clone() for name, buffer in job.net.named_buffers()}
    return {**found, **buffers, "step hooks": step_hooks}


@contextlib.contextmanager
def refused(job: Job, words: str, error: type[Exception] = ValueError) -> Iterator[None]:
    """The block raises with these words, and leaves all as it was."""
    before = everything(job)
    with pytest.raises(error, match=words):
        yield
    assert differences(before, everything(job)) == []


@pytest.mark.parametrize(
    ("targets", "error", "words"),
    [
        (lambda job: [], ValueError, "no target"),
        (lambda job: ["hidden_task3"], ValueError, "near names: .*hidden_task2.*"),
        (lambda job: ["hidden_task3.*"], ValueError, "no pattern that matches one"),
        (lambda job: ["output", "nothing"], ValueError, "'nothing' is no parameter and no module"),
        (lambda job: [""], ValueError, "'' is no parameter"),
        (lambda job: [build_net().output], ValueError, "this Linear is no module of the model"),
        (lambda job: [build_net().output.weight], ValueError, "is none of the model's"),
        (lambda job: [job.optimizer], TypeError, "is a Adam; give a name, a pattern, a module"),
        (lambda job: [["output"]], TypeError, "is a list; give a name"),
    ],
)
@pytest.mark.parametrize("requires_grad", [True, False])
def test_targets(
    targets: Callable[[Job], list[Any]],
    error: type[Exception],
    words: str,
    requires_grad: bool,
) -> None:
    job = Job()
    with refused(job, words, error):
        freeze(job.net, *targets(job), optimizer=job.optimizer, requires_grad=requires_grad)
    with refused(job, words, error), frozen(job.net, *targets(job), optimizer=job.optimizer):
        pytest.fail("the block was entered")


def other_optimizer(job: Job) -> torch.optim.Optimizer:
    return torch.optim.Adam(job.net.output.parameters())


@pytest.mark.parametrize(
    ("optimizer", "error", "words"),
    [
        (lambda job: None, TypeError, "is a NoneType; give a torch.optim.Optimizer"),
        (lambda job: job.net.output, TypeError, "is a Linear"),
        (lambda job: "adam", TypeError, "is a str"),
        (lambda job: [job.optimizer, job.net], TypeError, "is a Net"),
        (lambda job: [], ValueError, "no group of the given optimizer: hidden_task2.0.weight"),
        (other_optimizer, ValueError, "in no group .*: hidden_task2.0.weight. Give every"),
        (lambda job: torch.optim.LBFGS(job.net.parameters()), ValueError, "LBFGS takes a missing"),
        (
            lambda job: [job.optimizer, torch.optim.LBFGS(job.net.output.parameters())],
            ValueError,
            "LBFGS .* of the trained parameters only",
        ),
    ],
)
def test_optimizers(optimizer: Callable[[Job], Any], error: type[Exception], words: str) -> None:
    job = Job()
    with refused(job, words, error):
        freeze(job.net, REST, optimizer=optimizer(job))


def test_frozen_already() -> None:
    job = Job()
    freezing = freeze(job.net, REST, optimizer=job.optimizer)
    for target in (REST, f"{REST}.0.weight", "*"):
        with refused(job, "frozen already: hidden_task2.0.weight. Unfreeze the other"):
            freeze(job.net, "output", target, optimizer=job.optimizer)
    unfreeze(freezing)
    norm = freeze(job.net, f"{REST}.1", optimizer=job.optimizer)  # which has no parameters
    with refused(job, "frozen already: hidden_task2.1. Unfreeze the other"):
        freeze(job.net, REST, optimizer=job.optimizer)
    unfreeze(norm)
    unfreeze(freeze(job.net, "*", optimizer=job.optimizer))


def test_not_frozen_now() -> None:
    job = Job()
    freezing = freeze(job.net, REST, optimizer=job.optimizer)
    unfreeze(freezing, reset_state=True)
    for reset_state in (False, True):
        with refused(job, "not frozen now: hidden_task2.0.weight"):
            unfreeze(freezing, reset_state=reset_state)


def test_checkpoint_of_another_freezing() -> None:
    job = Job()
    first = freeze(job.net, REST, optimizer=job.optimizer)
    of_first = first.state_dict()
    unfreeze(first)
    second = freeze(job.net, "output", optimizer=job.optimizer)
    unfreeze(second)
    with refused(job, "checkpoint has frozen hidden_task2.0.weight, this .* of output.weight"):
        second.load_state_dict(of_first)
    third = freeze(job.net, "*", optimizer=job.optimizer)
    with refused(job, "frozen already: hidden_task2.0.weight"):
        first.load_state_dict(of_first)
    assert (first.is_active, second.is_active, third.is_active) == (False, False, True)
    third.load_state_dict(second.state_dict())  # in which nothing was frozen
    first.load_state_dict(of_first)
    assert (first.is_active, third.is_active) == (True, False)


@pytest.mark.parametrize("how", ["replaced", "removed"])
def test_an_optimizer_that_no_longer_holds_the_parameters(how: str) -> None:
    job = Job()
    with frozen(job.net, REST, optimizer=job.optimizer):
        job.step()
        groups = job.optimizer.param_groups
        if how == "removed":
            groups.clear()
            job.optimizer.add_param_group({"params": [job.net.output.weight]})
        else:  # as accelerator.prepare() may do after freeze()
            groups[0]["params"] = [nn.Parameter(each.detach()) for each in groups[0]["params"]]
        with refused(job, "in no group .*: hidden_task2.0.weight. .* after accelerator.prepare"):
            job.optimizer.step()


@pytest.mark.usefixtures("one_rank")
def test_wrappers() -> None:
    def refuses(model: nn.Module, words: str, **options: Any) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with pytest.raises(ValueError, match=words):
            freeze(model, "*", optimizer=optimizer, **options)
        assert all(part.training and not part._forward_pre_hooks for part in model.modules())
        assert all(parameter.requires_grad for parameter in model.parameters())

    class DeepSpeedEngine(nn.Sequential):
        """Stands for the real one, which is known by its name."""

    cpu = torch.device("cpu")
    part_wrapped = nn.Sequential(DistributedDataParallel(nn.Linear(3, 2)), nn.Linear(2, 2))
    refuses(FullyShardedDataParallel(nn.Linear(3, 2), device_id=cpu), "FSDP1.* use FSDP2")
    refuses(type("Mine", (DeepSpeedEngine,), {})(nn.Linear(3, 2)), "DeepSpeed steps its own copies")
    refuses(part_wrapped, "wraps a part of this model only")
    without = {"requires_grad": False}
    refuses(DistributedDataParallel(nn.Linear(3, 2)), "find_unused_parameters=True", **without)
    static = DistributedDataParallel(nn.Linear(3, 2), static_graph=True)
    refuses(static, "static_graph lets", **without)
    compiled: Any = torch.compile(DistributedDataParallel(nn.Linear(3, 2)))
    refuses(compiled, "not safe here", **without)
    sharded = nn.Linear(3, 2)
    fully_shard(sharded, mesh=init_device_mesh("cpu", (1,)))
    optimizer = torch.optim.SGD(sharded.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="FSDP2 looks at requires_grad once"):
        freeze(sharded, "*", optimizer=optimizer, requires_grad=False)


@pytest.mark.usefixtures("one_rank")
def test_wrappers_under_which_gradients_can_be_spared() -> None:
    model = DistributedDataParallel(nn.Linear(3, 2), find_unused_parameters=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with frozen(model, "bias", optimizer=optimizer, requires_grad=False):
        assert not model.module.bias.requires_grad
        model(torch.ones(4, 3)).sum().backward()
        assert model.module.bias.grad is None
        assert model.module.weight.grad is not None
    assert model.module.bias.requires_grad
