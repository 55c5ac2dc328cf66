"""What names, patterns, modules and parameters mean in a model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from toolkit.selection import listed, select


class Tower(nn.Module):
    """Two encoders over a shared dropout, a norm without parameters, and a tied decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.embedding = nn.Embedding(5, 3)
        dropout = nn.Dropout(0.5)
        self.first = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Tanh(), dropout))
        self.second = nn.Sequential(nn.Linear(3, 3), dropout)
        self.norm = nn.BatchNorm1d(3, affine=False)
        self.heads = nn.ModuleDict({"h1": nn.Linear(3, 2), "h2": nn.Linear(3, 2)})
        self.decoder = nn.Linear(3, 5, bias=False)
        self.decoder.weight = self.embedding.weight
        self.again = self.first


FIRST = {"first.0.weight", "first.0.bias"}
HEADS = {"heads.h1.weight", "heads.h1.bias", "heads.h2.weight", "heads.h2.bias"}
FIRST_MODULES = {"first", "first.0", "first.1", "first.1.0"}  # the dropout is the second's too


@pytest.mark.parametrize(
    ("targets", "parameters", "modules"),
    [
        (["scale"], {"scale"}, set()),
        (["first.0.weight"], {"first.0.weight"}, set()),
        (["first.0.weight", "first.0.bias"], FIRST, FIRST_MODULES),
        (["first"], FIRST, FIRST_MODULES),
        (["again"], FIRST, FIRST_MODULES),
        (["again.0.bias"], {"first.0.bias"}, set()),
        (["first.*"], FIRST, FIRST_MODULES),
        (["first", "first.0", "first.0.weight"], FIRST, FIRST_MODULES),
        (["first.1"], set(), {"first.1", "first.1.0"}),
        (["first.1.1"], set(), {"first.1.1"}),
        (["first.1.?"], set(), {"first.1.0", "first.1.1"}),
        (["second.1"], set(), {"first.1.1"}),  # by its first name
        (["norm"], set(), {"norm"}),
        (["heads"], HEADS, {"heads", "heads.h1", "heads.h2"}),
        (["heads.h2"], {"heads.h2.weight", "heads.h2.bias"}, {"heads.h2"}),
        (["heads.h2.*"], {"heads.h2.weight", "heads.h2.bias"}, {"heads.h2"}),
        (["heads.*"], HEADS, {"heads", "heads.h1", "heads.h2"}),
        (["heads.h?.weight"], {"heads.h1.weight", "heads.h2.weight"}, set()),
        (["heads.h[!1].bias"], {"heads.h2.bias"}, set()),
        (["h*.bias"], {"heads.h1.bias", "heads.h2.bias"}, set()),
        (["decoder"], {"embedding.weight"}, {"embedding", "decoder"}),
        (["decoder.weight"], {"embedding.weight"}, {"embedding", "decoder"}),
        (["embedding"], {"embedding.weight"}, {"embedding", "decoder"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_names_and_patterns(targets: list[str], parameters: set[str], modules: set[str]) -> None:
    model = Tower()
    selection = select(model, targets)
    assert set(selection.parameters) == parameters
    assert set(selection.modules) == modules
    for name, parameter in selection.parameters.items():
        assert parameter is model.get_parameter(name)
    for name, module in selection.modules.items():
        assert module is model.get_submodule(name)


def test_objects_mean_what_their_names_mean() -> None:
    model = Tower()
    targets: list[Any] = [model.heads["h1"], model.second[0].weight, "scale", model.decoder.weight]
    names = ["heads.h1", "second.0.weight", "scale", "decoder.weight"]
    assert select(model, targets) == select(model, names)


@pytest.mark.parametrize("by", ["pattern", "module", "parameters"])
def test_all_of_the_model(by: str) -> None:
    model = Tower()
    targets: dict[str, list[Any]] = {
        "pattern": ["*"],
        "module": [model],
        "parameters": list(model.parameters()),
    }
    selection = select(model, targets[by])
    assert selection.parameters == dict(model.named_parameters())
    assert selection.modules == dict(model.named_modules())


def test_order_is_the_models_order() -> None:
    model = Tower()
    names = list(select(model, ["heads.h2", "heads.h1", "scale"]).parameters)
    assert names == [name for name, _ in model.named_parameters() if name in {*HEADS, "scale"}]


def test_a_layer_as_the_whole_model() -> None:
    layer = nn.Linear(2, 2)
    assert set(select(layer, ["weight"]).modules) == set()
    assert set(select(layer, ["weight", "bias"]).modules) == {""}
    assert set(select(layer, ["*"]).parameters) == {"weight", "bias"}


@pytest.mark.parametrize(
    ("targets", "error", "words"),
    [
        ([], ValueError, "no target"),
        (["heads.h3"], ValueError, "'heads.h3' is no parameter.*near names: .*heads.h1"),
        (["Heads"], ValueError, "near names: heads"),
        (["zzz"], ValueError, "it has embedding, .* and \\d+ more"),
        (["heads.h3.*"], ValueError, "no pattern that matches one"),
        (["module.heads.h1"], ValueError, "near names: .*heads.h1"),
        ([""], ValueError, "'' is no parameter"),
        (["scale", nn.Linear(3, 2)], ValueError, "this Linear is no module of the model"),
        ([nn.Parameter(torch.ones(4, 7))], ValueError, "shape \\(4, 7\\) is none of the model's"),
        ([3], TypeError, "target 3 is a int"),
        ([["scale"]], TypeError, "is a list; give a name"),
        ([torch.ones(1)], TypeError, "is a Tensor; give a name"),
        ([None], TypeError, "is a NoneType"),
    ],
    ids=str,
)
def test_refused(targets: list[Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        select(Tower(), targets)


def test_an_equal_parameter_of_another_model_is_another_one() -> None:
    with pytest.raises(ValueError, match="none of the model's"):
        select(Tower(), [Tower().scale])
    with pytest.raises(ValueError, match=r"this ModuleDict is no module of the model: ModuleDict"):
        select(Tower(), [Tower().heads])


def test_long_lists_are_cut() -> None:
    names = [f"n{number}" for number in range(11)]
    assert listed(names) == "n0, n1, n2, n3, n4, n5, n6, n7 and 3 more"
    assert listed(names[:8]).endswith("n6, n7")
