"""What freezing refuses on two ranks, and with which words. Part of ``freezing_job``."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist

from tests import IS_OLD_FSDP2
from tests.frozen_cases import REST, differences, snapshot
from tests.jobs.freezing_training import Case, train, warmed_up
from toolkit.freezing import freeze, frozen, unfreeze


def unused_layer(mode: str) -> str:
    """The resting layer takes no part in the forward, and DistributedDataParallel waits for it."""
    case = Case(mode=mode, situation="unused")
    trainee = warmed_up(case)
    net, optimizer = trainee.net, trainee.optimizer
    before = snapshot(net, optimizer)
    with frozen(trainee.model, REST, optimizer=optimizer):
        message = error_of(lambda: train(trainee, case))
    assert differences(before, snapshot(net, optimizer)) == [], "the refused step moved something"
    return message


def frozen_sets_differ() -> str:
    trainee = warmed_up(Case())
    layer = ("hidden_task1", "hidden_task2")[dist.get_rank()]
    message = error_of(lambda: freeze(trainee.model, layer, optimizer=trainee.optimizer))
    train(trainee, Case())  # nothing is held
    return message


def one_rank_asks_for_nothing() -> str:
    trainee = warmed_up(Case())
    layer = ("hidden_task3", "hidden_task2")[dist.get_rank()]
    return error_of(lambda: freeze(trainee.model, layer, optimizer=trainee.optimizer))


def one_rank_unfreezes() -> str:
    trainee = warmed_up(Case())
    first, second = (
        freeze(trainee.model, name, optimizer=trainee.optimizer)
        for name in ("hidden_task1", "hidden_task2")
    )
    return error_of(lambda: unfreeze((first, second)[dist.get_rank()]))


def saving_compute(mode: str) -> str:
    trainee = warmed_up(Case(mode=mode))
    return error_of(
        lambda: freeze(trainee.model, REST, optimizer=trainee.optimizer, requires_grad=False)
    )


REFUSALS: dict[str, Callable[[], str]] = {
    "unused-default": lambda: unused_layer("default"),
    "unused-static-graph": lambda: unused_layer("static-graph"),
    "unused-bucket-view": lambda: unused_layer("bucket-view"),
    "sets-differ": frozen_sets_differ,
    "unknown-on-one-rank": one_rank_asks_for_nothing,
    "unfrozen-on-one-rank": one_rank_unfreezes,
    "saving-compute-default": lambda: saving_compute("default"),
    "saving-compute-static-graph": lambda: saving_compute("static-graph"),
}
if not IS_OLD_FSDP2:
    REFUSALS["saving-compute-fsdp2"] = lambda: saving_compute("fsdp2")


def error_of(action: Callable[[], object]) -> str:
    """The message with which ``action`` fails; empty if it does not."""
    try:
        action()
    except (ValueError, RuntimeError) as error:
        return str(error)
    return ""
