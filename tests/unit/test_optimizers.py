"""Optimizers by name, and messages that say what a class takes."""

from __future__ import annotations

import argparse
from typing import Any

import pytest
import torch
from torch import nn

from toolkit.optimizers import make_optimizer, optimizer_arguments


def make(*flags: str) -> torch.optim.Optimizer:
    args = argparse.ArgumentParser(parents=[optimizer_arguments("Adam")]).parse_args(flags)
    return make_optimizer(args, nn.Linear(2, 2, bias=False).parameters())


@pytest.mark.parametrize(
    ("flags", "kind", "settings"),
    [
        ("", torch.optim.Adam, {"lr": 1e-3, "foreach": None, "fused": None}),
        ("--optimizer adamW --learning_rate 0.5", torch.optim.AdamW, {"lr": 0.5}),
        ("--optimizer_form loop", torch.optim.Adam, {"foreach": False, "fused": False}),
        ("--optimizer rprop --optimizer_form loop", torch.optim.Rprop, {"foreach": False}),
        ("--optimizer_form fused", torch.optim.Adam, {"fused": True, "foreach": None}),
        (
            "--optimizer_args betas=(0.8,0.9) amsgrad=True",
            torch.optim.Adam,
            {"betas": (0.8, 0.9), "amsgrad": True},
        ),
    ],
)
def test_that_flags_reach_the_class(
    flags: str, kind: type[torch.optim.Optimizer], settings: dict[str, Any]
) -> None:
    optimizer = make(*flags.split())
    assert type(optimizer) is kind
    assert {name: optimizer.defaults[name] for name in settings} == settings


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--optimizer adamm", "torch.optim has no 'adamm'; take ASGD, Adadelta"),
        ("--optimizer Optimizer", "torch.optim has no 'Optimizer'"),
        ("--optimizer lbfgs", "LBFGS cannot be used here: it moves all parameters"),
        ("--optimizer SparseAdam", "SparseAdam cannot be used here: it takes sparse gradients"),
        ("--optimizer_args lr", "expected key=value, got 'lr'"),
        ("--optimizer_args amsgrad=true", "amsgrad= wants a Python literal such as 0.9"),
    ],
)
def test_refused_flags(flags: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        make(*flags.split())
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--optimizer sgd --optimizer_args betas=(0.9,0.9)",
            "SGD takes no argument betas here; it takes momentum, dampening, weight_decay, "
            "nesterov, maximize$",
        ),
        ("--optimizer_args lr=0.1", "lr: give it by --learning_rate"),
        ("--optimizer rprop --optimizer_form fused", "Rprop has no fused form"),
        ("--optimizer_args eps=-1", "Invalid epsilon value"),
    ],
)
def test_refused_settings(flags: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(*flags.split())
