"""Optimizers by name, messages that say what a class takes, learning rates by part, schedules."""

from __future__ import annotations

import argparse
from typing import Any

import pytest
import torch
from torch import nn

from toolkit.models import build_model
from toolkit.optimizers import (
    build_optimizer,
    build_scheduler,
    learning_rates,
    optimizer_arguments,
    parameter_groups,
    rate_arguments,
)


def make(*flags: str) -> torch.optim.Optimizer:
    args = argparse.ArgumentParser(parents=[optimizer_arguments("Adam")]).parse_args(flags)
    return build_optimizer(args, nn.Linear(2, 2, bias=False).parameters())


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
        ("--weight_decay 0.25", torch.optim.Adam, {"weight_decay": 0.25}),
        ("--optimizer adamw --weight_decay 0", torch.optim.AdamW, {"weight_decay": 0.0}),
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
        ("--optimizer_args weight_decay=0.1", "weight_decay: give it by --learning_rate, --weight"),
        ("--optimizer rprop --weight_decay 1", "Rprop takes no argument weight_decay here"),
        ("--optimizer_args betas=3", "Adam fails with these arguments"),
        ("--optimizer rprop --optimizer_form fused", "Rprop has no fused form"),
        ("--optimizer_args eps=-1", "Invalid epsilon value"),
    ],
)
def test_refused_settings(flags: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(*flags.split())


def train_parts(*flags: str) -> tuple[torch.optim.Optimizer, list[dict[str, float]]]:
    """Four steps of SGD with a linear schedule, two of them warm-up; the rates by tag."""
    parser = argparse.ArgumentParser(
        parents=[optimizer_arguments("SGD", 0.5), rate_arguments(["h1", "h2"])]
    )
    parser.set_defaults(lr_scheduler_type="linear", num_warmup_steps=2)
    args = parser.parse_args(flags)
    network = build_model((1, 8, 8), {"h1": 3, "h2": 2}, seed=0)
    network.heads["h2"].requires_grad_(False)
    optimizer = build_optimizer(args, parameter_groups(args, network))
    scheduler = build_scheduler(args, optimizer, 4)
    rates = []
    for _ in range(4):
        for parameter in network.parameters():
            parameter.grad = torch.ones_like(parameter)
        before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        rates.append(learning_rates(scheduler))
        optimizer.step()
        by_group = list(rates[-1].values()) * (3 if len(rates[-1]) == 1 else 1)
        for part, rate in zip(("backbone", "heads.h1", "heads.h2"), by_group, strict=True):
            name = next(name for name in before if name.startswith(part))
            moved = before[name] - network.state_dict()[name]
            torch.testing.assert_close(moved, torch.full_like(moved, rate), atol=1e-6, rtol=0)
        scheduler.step()
    return optimizer, rates


def test_that_every_part_has_its_own_rate_and_keeps_its_ratio() -> None:
    optimizer, rates = train_parts("--lr_head1", "0.1", "--lr_head2", "2")
    names = [f"train/learning rate {part}" for part in ("backbone", "h1", "h2")]
    expected = [[factor * rate for rate in (0.5, 0.1, 2.0)] for factor in (0, 0.5, 1, 0.5)]
    assert [list(step) for step in rates] == [names] * 4
    assert [list(step.values()) for step in rates] == expected
    assert len(optimizer.param_groups) == 3


def test_that_a_rate_of_a_part_that_is_not_there_is_refused() -> None:
    args = rate_arguments(["h2", "h3"]).parse_args(["--lr_head2", "0.1", "--lr_head3", "0.2"])
    args.learning_rate = 1.0
    network = build_model((1, 8, 8), {"h3": 2}, seed=0)
    with pytest.raises(ValueError, match=r"--lr_head2 is of a part .* does not train: h2"):
        parameter_groups(args, network)
    args.lr_head2 = None
    assert [group["lr"] for group in parameter_groups(args, network)] == [1.0, 0.2]


def test_that_parts_without_a_flag_have_the_common_rate() -> None:
    _, rates = train_parts()
    assert rates == [{"train/learning rate": rate} for rate in (0.0, 0.25, 0.5, 0.25)]
    _, rates = train_parts("--lr_backbone", "0.1")
    assert list(rates[2].values()) == [0.1, 0.5, 0.5]


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0, [1, 1, 1, 1, 1]),
        ("constant_with_warmup", 2, [0, 0.5, 1, 1, 1]),
        ("linear", 0, [1, 0.75, 0.5, 0.25, 0]),
        ("linear", 2, [0, 0.5, 1, 0.5, 0]),
        ("cosine", 0, [1, 0.8535534, 0.5, 0.1464466, 0]),
    ],
)
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_schedule(schedule: str, warmup: int, expected: list[float]) -> None:
    args = argparse.Namespace(lr_scheduler_type=schedule, num_warmup_steps=warmup)
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0)
    scheduler = build_scheduler(args, optimizer, 4)
    rates = []
    for _ in expected:
        rates += scheduler.get_last_lr()
        scheduler.step()
    assert rates == pytest.approx(expected)
