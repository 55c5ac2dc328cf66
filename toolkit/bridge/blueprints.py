"""Which heads of a receiver can have a teacher, and how each is made."""

from __future__ import annotations

import logging

from accelerate import Accelerator
from torch import nn

from toolkit.bridge.agreement import in_lines
from toolkit.bridge.config import BridgeConfig
from toolkit.bridge.teacher import Blueprint, TeacherFactory, blueprints_of, tensors_of
from toolkit.parameters import SharedParameters
from toolkit.sharding import is_sharded

logger = logging.getLogger(__name__)


def draw_blueprints(
    accelerator: Accelerator,
    model: nn.Module,
    shared: SharedParameters,
    config: BridgeConfig,
    *,
    backbone: str,
    factory: TeacherFactory | None,
) -> dict[str, Blueprint]:
    """How teachers are made, by head; none where none can stand in for a donor.

    Args:
        accelerator: the job's.
        model: the bare model.
        shared: its shared tensors.
        config: the settings.
        backbone: name of the backbone's submodule.
        factory: makes a teacher, where the modules cannot.

    Raises:
        ValueError: if the factory makes another model than exchange ``auto`` needs.
    """
    if not config.has_teachers:
        return {}
    if (obstacle := _obstacle_to_teachers(config, shared, factory)) is not None:
        logger.info("no teacher will stand in for a donor that goes away: %s", obstacle)
        return {}
    blueprints = blueprints_of(accelerator, model, shared, backbone=backbone, factory=factory)
    for head, blueprint in blueprints.items():
        lines = blueprint.differences(tensors_of(shared, head), "receiver")
        if lines and config.exchange == "auto":
            raise ValueError(
                "in exchange 'auto' teacher_factory must make a model with the receiver's "
                f"backbone and {head}; these differ:{in_lines(lines)}"
            )
    return blueprints


def _obstacle_to_teachers(
    config: BridgeConfig, shared: SharedParameters, factory: TeacherFactory | None
) -> str | None:
    """Exchange ``auto``: why no teacher can stand in for a donor; None if one can."""
    if config.exchange != "auto":
        return None
    if config.no_stand_in is not None:
        return config.no_stand_in
    if (sharded := sharded_head(shared)) is None:
        return None
    if not sharded.requires_grad:
        return "FSDP2 reduces no gradient of a head that was frozen when it was sharded"
    if factory is None:
        return "FSDP2's modules cannot be copied: give GradientReceiver a teacher_factory"
    return None


def sharded_head(shared: SharedParameters) -> nn.Parameter | None:
    """A parameter of the heads that FSDP2 manages, a frozen one if there is any; or None.

    FSDP2 reduces what gets a gradient, whenever that is, so that heads need not rest for its sake,
    but it learns at the first forward for good what may get one.
    """
    sharded = [parameter for parameter in shared.head.values() if is_sharded(parameter)]
    return min(sharded, key=lambda parameter: parameter.requires_grad, default=None)


def check_sharded_head(shared: SharedParameters) -> None:
    """Refuse a head that no teacher can ever train.

    Raises:
        ValueError: if FSDP2 manages a frozen one.
    """
    parameter = sharded_head(shared)
    if parameter is not None and not parameter.requires_grad:
        name = next(name for name, other in shared.head.items() if other is parameter)
        raise ValueError(
            f"{name!r} is sharded by FSDP2, which would never reduce a gradient of a "
            "parameter that was frozen at first: leave requires_grad_(False) out in exchange "
            "'distill'; FSDP2 does not wait for a head that gets no gradient"
        )
