"""Flags of the methods for several tasks."""

from __future__ import annotations

import argparse

import pytest
import torch

from toolkit.methods import (
    check_method_arguments,
    find_method,
    method_arguments,
    method_groups,
    rotating_model,
)
from toolkit.models import build_model
from toolkit.rotograd import RotoGradNorm


def parsed(*flags: str, num_tasks: int = 2) -> argparse.Namespace:
    parser = argparse.ArgumentParser(parents=[method_arguments()])
    parser.add_argument("--learning_rate", type=float, default=0.01)
    parser.set_defaults(report_to="none")
    args = parser.parse_args(flags)
    check_method_arguments(parser, args, num_tasks)
    return args


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method=rotagrad"], "'rotagrad' is neither 'sum' nor one of"),
        (["--coop_after=5"], "--coop_after is of --method rotate or rotograd or rotogradnorm"),
        (["--method=pcgrad", "--learning_rate_rotation=1"], "--learning_rate_rotation is of"),
        (["--method=rotograd", "--alpha=1"], "--alpha is of --method rotogradnorm, not of 'roto"),
        (["--method=rotate", "--burn_in_period=3"], "--burn_in_period is of --method rotograd or"),
        (["--method=rotogradnorm", "--alpha=nan"], "--alpha must be finite, got nan"),
        (["--method=rotograd", "--coop_after=-1"], "expected a whole number of at least 0"),
    ],
)
def test_refused(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed(*flags)
    assert message in capsys.readouterr().err


def test_defaults() -> None:
    args = parsed("--method=rotogradnorm")
    assert (args.alpha, args.burn_in_period, args.coop_after) == (1.0, 20, None)
    assert args.learning_rate_rotation == 0.005
    assert find_method("sum", 5) is find_method("rotate", 5) is None


def test_model_and_groups() -> None:
    network = build_model((1, 8, 8), {"h1": 10, "h2": 5}, seed=0)
    args = parsed("--method=rotogradnorm", "--alpha=0.5", "--burn_in_period=3")
    images = torch.zeros(1, 1, 8, 8)
    model = rotating_model(args, network, images)
    assert isinstance(model, RotoGradNorm)
    assert model.backbone is network.backbone
    assert list(model.heads) == list(network.heads.values())
    assert (model.size_z, model.burn_in_period, model.alpha) == (48, 3, 0.5)
    groups = method_groups(args, network, model)
    names = ["backbone", "h1", "h2", "rotations"]
    assert [group["name"] for group in groups] == names
    assert [group["lr"] for group in groups] == [0.01, 0.01, 0.01, 0.005]
    assert groups[3]["params"] == model.rotation_parameters()
    of_network = [parameter for group in groups[:3] for parameter in group["params"]]
    assert of_network == list(network.parameters())
    args = parsed("--method=pcgrad")
    assert rotating_model(args, network, images) is None
    assert [group["name"] for group in method_groups(args, network, None)] == names[:3]
