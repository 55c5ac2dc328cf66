"""Which tensors two jobs share, and how a difference is told."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    ActivationWrapper,
    apply_activation_checkpointing,
)

from toolkit.parameters import (
    check_in_optimizer,
    check_only_shared_trains,
    schema_differences,
    shared_parameters,
)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
        self.backbone.register_buffer("cache", torch.zeros(2), persistent=False)
        self.backbone2 = nn.BatchNorm1d(3)
        self.heads = nn.ModuleDict({"h1": nn.Linear(3, 2), "h2": nn.Linear(3, 5)})
        self.heads["h1"].register_buffer("own", torch.zeros(1))
        self.heads["h2"].register_buffer("step", torch.tensor(0))
        self.scale = nn.Parameter(torch.ones(()))
        self.nothing = nn.Identity()


def test_what_is_shared() -> None:
    net = Net()

    shared = shared_parameters(net, "backbone", ["heads.h2"])

    assert list(shared.backbone) == [
        "backbone.0.weight", "backbone.0.bias", "backbone.1.weight", "backbone.1.bias",
    ]  # fmt: skip
    assert list(shared.head) == ["heads.h2.weight", "heads.h2.bias"]
    assert list(shared.buffers) == [
        "backbone.1.running_mean", "backbone.1.running_var", "backbone.1.num_batches_tracked",
        "heads.h2.step",
    ]  # fmt: skip
    assert shared.parameters == shared.backbone | shared.head
    assert list(shared.weights) == [*shared.backbone, *shared.head, *shared.buffers]


def test_that_what_is_shared_is_the_models_own() -> None:
    net = Net()
    shared = shared_parameters(net, "backbone", ["heads.h2"])

    assert shared.head["heads.h2.weight"] is net.heads["h2"].weight
    assert shared.buffers["backbone.1.running_mean"] is net.backbone[1].running_mean
    assert all(isinstance(parameter, nn.Parameter) for parameter in shared.parameters.values())


def test_that_the_schema_crosses_a_json_file() -> None:
    net = Net()
    net.backbone[0].to(torch.bfloat16)

    schemas = shared_parameters(net, "backbone", ["heads.h2"]).schemas()

    assert set(schemas) == {"backbone", "heads.h2"}
    assert schemas["backbone"]["backbone.0.weight"] == ["bfloat16", [3, 4]]
    assert schemas["heads.h2"]["heads.h2.step"] == ["int64", []]
    assert json.loads(json.dumps(schemas)) == schemas


@pytest.mark.parametrize(
    ("backbone", "head", "words"),
    [
        ("trunk", "heads.h2", "no module 'trunk'; it has backbone, .*heads.h1"),
        ("backbone", "heads.h3", "no module 'heads.h3'"),
        ("", "heads.h2", "no module ''"),
        ("backbone", "scale", "no module 'scale'"),
        ("backbone", "nothing", "'nothing' has no parameters of its own"),
        ("backbone", "backbone", "each module must be named once"),
        ("heads", "heads.h2", "overlap in 'heads.h2.weight'"),
        ("backbone.0", "backbone", "overlap"),
    ],
)
def test_that_modules_that_cannot_be_shared_are_refused(
    backbone: str, head: str, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        shared_parameters(Net(), backbone, [head])


def test_that_a_tensor_tied_to_one_outside_is_not_left_out_in_silence() -> None:
    # named_parameters() gives a tied tensor once, under its first name. Where that lies
    # outside both modules, the tensor crosses neither way, and the jobs train different models.
    net = Net()
    net.heads["h2"].weight = net.heads["h1"].weight = nn.Parameter(torch.ones(5, 3))

    try:
        shared = shared_parameters(net, "backbone", ["heads.h2"])
    except ValueError:
        return
    assert "heads.h2.weight" in shared.head


def test_that_a_compiled_module_keeps_its_plain_names() -> None:
    # Else a job with a compiled backbone would not fit one without.
    plain, net = shared_parameters(Net(), "backbone", ["heads.h2"]), Net()
    inner = net.backbone[0]
    compiled: Any = torch.compile(inner)
    net.backbone[0] = compiled
    compiled = torch.compile(net.backbone)
    net.backbone = compiled

    shared = shared_parameters(net, "backbone", ["heads.h2"])

    assert shared.schemas() == plain.schemas()
    assert list(shared.weights) == list(plain.weights)
    assert shared.backbone["backbone.0.weight"] is inner.weight
    assert list(shared_parameters(net, "backbone.1", ["heads.h2"]).backbone) == [
        "backbone.1.weight", "backbone.1.bias",
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"no module 'trunk'; it has backbone, backbone\.0"):
        shared_parameters(net, "trunk", ["heads.h2"])


def test_that_a_checkpointed_module_keeps_its_plain_names_and_buffers() -> None:
    # Accelerate wraps so, and the buffers of such a module would not cross.
    plain, net = shared_parameters(Net(), "backbone", ["heads.h2"]), Net()
    apply_activation_checkpointing(net, check_fn=lambda m: not isinstance(m, (Net, nn.ModuleDict)))
    assert isinstance(net.backbone[0], ActivationWrapper), "this test says nothing"

    shared = shared_parameters(net, "backbone", ["heads.h2"])

    assert shared.schemas() == plain.schemas()
    assert list(shared.weights) == list(plain.weights)


def test_that_equal_schemas_do_not_differ() -> None:
    schema = shared_parameters(Net(), "backbone", ["heads.h2"]).schemas()["backbone"]

    assert schema_differences(schema, json.loads(json.dumps(schema)), "donor", "receiver") == []


def test_that_every_difference_is_told_with_both_shapes() -> None:
    mine: dict[str, list[Any]] = {
        "a": ["float32", [2, 3]],
        "b": ["float32", []],
        "c": ["float32", [1]],
    }
    theirs: dict[str, list[Any]] = {
        "a": ["float32", [3, 2]],
        "b": ["float64", []],
        "d": ["int64", [4]],
    }

    assert schema_differences(mine, theirs, "donor", "receiver") == [
        "a: donor float32 (2, 3), receiver float32 (3, 2)",
        "b: donor float32 (), receiver float64 ()",
        "c: donor float32 (1,), receiver absent",
        "d: donor absent, receiver int64 (4,)",
    ]


def test_that_an_optimizer_must_hold_every_shared_parameter() -> None:
    net = Net()
    net.heads["h2"].requires_grad_(False)
    shared = shared_parameters(net, "backbone", ["heads.h2"]).parameters
    check_in_optimizer(shared, torch.optim.SGD(net.parameters(), lr=0.1))
    groups = [{"params": net.backbone.parameters()}, {"params": net.heads.parameters()}]
    check_in_optimizer(shared, torch.optim.SGD(groups, lr=0.1))
    filtered = [parameter for parameter in net.parameters() if parameter.requires_grad]

    with pytest.raises(ValueError, match=r"group: heads.h2.weight, heads.h2.bias\. Give"):
        check_in_optimizer(shared, torch.optim.SGD(filtered, lr=0.1))


def test_that_an_equal_tensor_is_not_the_same_tensor() -> None:
    net, other = Net(), Net()
    other.load_state_dict(net.state_dict())
    shared = shared_parameters(net, "backbone", ["heads.h2"]).parameters

    with pytest.raises(ValueError, match="in no optimizer group"):
        check_in_optimizer(shared, torch.optim.SGD(other.parameters(), lr=0.1))


def test_that_a_part_of_a_donors_head_without_gradient_is_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    net = Net().requires_grad_(False)
    for part in (net.backbone, net.heads["h2"]):
        part.requires_grad_(True)
    shared = shared_parameters(net, "backbone", ["heads.h2"])
    check_only_shared_trains(net, shared)
    assert not caplog.records
    net.heads["h2"].weight.requires_grad_(False)  # as the base of adapters is
    check_only_shared_trains(net, shared)
    assert "require no gradient: heads.h2.weight. " in caplog.text
    assert "weight_decay=0" in caplog.text
