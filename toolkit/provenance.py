"""What a launch must be told to happen again, and what else its bits depend on."""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import accelerate
import torch
from accelerate import Accelerator


def provenance(accelerator: Accelerator, args: argparse.Namespace) -> dict[str, Any]:
    """A recipe's parsed arguments and its environment, for ``results.json``.

    Args:
        accelerator: the job's accelerator.
        args: what the recipe parsed, defaults included.
    """
    return {
        "arguments": {
            name: str(value) if isinstance(value, Path) else value
            for name, value in vars(args).items()
        },
        "environment": environment(accelerator),
    }


def environment(accelerator: Accelerator) -> dict[str, Any]:
    """What else than the arguments a job's bits depend on."""
    return {
        "python": platform.python_version(),  # whose sources are the text of --task text
        "torch": torch.__version__,
        "accelerate": accelerate.__version__,
        "device": device_name(accelerator.device),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "num_threads": torch.get_num_threads(),
        "distributed_type": accelerator.distributed_type.value,
        "mixed_precision": accelerator.mixed_precision,
        "dynamo_backend": accelerator.state.dynamo_plugin.backend.value,
        "working_directory": os.getcwd(),
    }


def device_name(device: torch.device) -> str:
    """The device's type, and for a GPU its model."""
    if device.type != "cuda":
        return device.type
    return f"cuda ({torch.cuda.get_device_name(device)})"


def flags_of(arguments: Mapping[str, Any], leave_out: Collection[str] = ()) -> list[str]:
    """The command line that gives these parsed arguments.

    Args:
        arguments: by name, as :func:`provenance` records them. A switch that is off and a value
            that is None are left to the parser's default.
        leave_out: names of arguments that the new launch does not get.
    """
    flags: list[str] = []
    for name, value in arguments.items():
        if name in leave_out or value is None or value is False:
            continue
        if value is True:
            flags.append(f"--{name}")
        elif isinstance(value, Mapping):
            flags.append(f"--{name}=" + ",".join(f"{key}={part}" for key, part in value.items()))
        elif isinstance(value, (list, tuple)):
            flags += [f"--{name}", *map(str, value)]
        else:
            flags.append(f"--{name}={value}")
    return flags
