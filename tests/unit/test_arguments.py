"""Flags: defaults, and messages for what makes no sense."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from toolkit.arguments import (
    check_arguments,
    check_output_arguments,
    data_arguments,
    output_arguments,
    step_arguments,
    training_arguments,
)
from toolkit.bridge.arguments import bridge_arguments, check_bridge_arguments
from toolkit.bridge.donor_arguments import donor_arguments


def parse(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(parents=[data_arguments(), training_arguments()])
    args = parser.parse_args(flags)
    check_arguments(parser, args)
    return args


def test_defaults() -> None:
    args = parse()
    assert args.task == "digits"
    assert args.mixed_precision is None
    assert args.report_to == "tensorboard"
    assert args.max_train_steps == 400
    assert args.output_dir is None


def test_values() -> None:
    args = parse("--output_dir", "x", "--checkpointing_steps", "epoch", "--num_train_epochs", "2")
    assert args.output_dir == Path("x")
    assert args.checkpointing_steps == "epoch"
    assert args.max_train_steps is None
    assert parse("--checkpointing_steps", "50").checkpointing_steps == 50
    assert parse("--no-with_tracking").report_to == "none"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--per_device_train_batch_size 0", "whole number of at least 1, got '0'"),
        ("--gradient_accumulation_steps 1.5", "whole number of at least 1, got '1.5'"),
        ("--learning_rate nan", "number above 0, got 'nan'"),
        ("--learning_rate inf", "number above 0, got 'inf'"),
        ("--weight_decay -1", "number of at least 0"),
        ("--seed -1", "whole number of at least 0"),
        ("--checkpointing_steps often", "a number of steps, or 'epoch', got 'often'"),
        ("--dataset_name x", "--num_classes H1 H2"),
        ("--dataset_name x --num_classes 2", "--num_classes takes 2 to 3 numbers, got 1"),
        ("--dataset_name x --num_classes 2 3 4 5", "--num_classes takes 2 to 3 numbers, got 4"),
        ("--num_classes 2 3", "--num_classes is about data of your own"),
        ("--image_shape 1 8 8", "--image_shape is about data of your own"),
        ("--image_column picture", "--image_column is about data of your own"),
        ("--dataset_split test", "--dataset_split is about data of your own"),
        ("--dataset_name x --num_classes 2 3 --image_shape 2 8 8", "1 or 3 channels, got 2"),
        ("--num_warmup_steps 3", "--num_warmup_steps needs a schedule"),
        ("--checkpoints_total_limit 2", "needs --checkpointing_steps"),
    ],
)
def test_refused(flags: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(*flags.split())
    assert message in capsys.readouterr().err


def test_that_a_recipe_can_take_steps_and_output_alone(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser(parents=[step_arguments(7), output_arguments()])
    args = parser.parse_args(["--no-with_tracking"])
    check_output_arguments(parser, args)
    assert args.report_to == "none"
    assert not hasattr(args, "optimizer")
    assert "7 if neither is given" in " ".join(parser.format_help().split())
    with pytest.raises(SystemExit):
        check_output_arguments(parser, parser.parse_args(["--checkpoints_total_limit", "1"]))
    assert "needs --checkpointing_steps" in capsys.readouterr().err


def test_that_ranks_must_have_patience_for_the_waits_of_the_bridge(
    capsys: pytest.CaptureFixture[str],
) -> None:
    parser = argparse.ArgumentParser(parents=[bridge_arguments(), donor_arguments()])
    check_bridge_arguments(parser, parser.parse_args(["--rank_timeout", "11"]))
    with pytest.raises(SystemExit):
        check_bridge_arguments(parser, parser.parse_args(["--rank_timeout", "10"]))
    assert "--rank_timeout: must be more than 10 s, got 10" in capsys.readouterr().err
