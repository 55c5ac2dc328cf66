"""Deliberate faults: each makes one job of the bridge wrong in one way; the oracle must see it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.matrix.joint import count, windows
from tests.matrix.setting import MAX_GRAD_NORM, Setting, Side, Silo
from toolkit import GradientDonor, GradientReceiver
from toolkit.bridge.accumulation import Window, WindowAccumulator
from toolkit.bridge.config import Role
from toolkit.bridge.injection import Injector
from toolkit.bridge.payload import Record

_add = Injector.add_
_load = GradientDonor._load
_close = WindowAccumulator.close
_backward = WindowAccumulator.backward
_publish_window = GradientDonor._publish_window


@dataclasses.dataclass(frozen=True)
class Mutation:
    """A method that is replaced in one job, and the settings in which that changes anything.

    One that multiplies a job's whole gradient by a constant changes nothing under Adafactor, which
    takes such a factor out again, where no gradient is a sum of both jobs' and none is clipped.
    """

    role: Role
    owner: type
    method: str
    replacement: Callable[..., Any]
    matters: Callable[[Setting], bool] = lambda setting: True
    is_constant_factor: bool | Callable[[Setting], bool] = False

    def has_effect(self, setting: Setting) -> bool:
        """Whether a setting ends elsewhere with it."""
        is_invariant = (
            setting.optimizer == "adafactor" and setting.scope == "head" and not setting.clip
        )
        constant = self.is_constant_factor
        is_constant = constant(setting) if callable(constant) else constant
        return self.matters(setting) and not (is_constant and is_invariant)


def _payload(change: Callable[[Injector, dict[str, Tensor]], dict[str, Tensor]]) -> Any:
    """Change the donor's tensors before they are added."""

    def add(self: Injector, tensors: dict[str, Tensor], factor: float, w: float) -> None:
        _add(self, change(self, dict(tensors)), factor, w)

    return add


def _times(factor: Callable[[Injector], float]) -> Any:
    return _payload(lambda job, tensors: {n: t * factor(job) for n, t in tensors.items()})


def _twice(self: Injector, tensors: Any, factor: float, w: float) -> None:
    _add(self, tensors, factor, w)
    _add(self, tensors, factor, w)


def _on_one_rank(self: Injector, tensors: Any, factor: float, w: float) -> None:
    """Zeros on the others, which must clip and step the same tensors where they are sharded."""
    _add(self, tensors, factor if self.accelerator.is_main_process else 0.0, w)


def _without_one(job: Injector, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    name = next(iter(job.shared.head))
    return {**tensors, name: torch.zeros_like(tensors[name])}


def _swapped(job: Injector, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The first two tensors of one shape, each in the place of the other."""
    trained = [n for n in tensors if n in job.shared.head or job.shared.backbone[n].requires_grad]
    first, second = next(
        (a, b)
        for i, a in enumerate(trained)
        for b in trained[i + 1 :]
        if tensors[a].shape == tensors[b].shape
    )
    return {**tensors, first: tensors[second], second: tensors[first]}


def clip_before(self: Injector, tensors: Any, factor: float, w: float) -> None:
    """Clip the receiver's own part only; the loop's own clipping is left out (see ``job.py``)."""
    scaler = self.accelerator.scaler
    scale = float(scaler.get_scale()) if scaler is not None else 1.0
    nn.utils.clip_grad_norm_(self.parameters, MAX_GRAD_NORM * scale)
    _add(self, tensors, factor, w)


def _window(factor: Callable[[WindowAccumulator, Window], float]) -> Any:
    """Change the factor that makes ``.grad`` a sum."""

    def close(self: WindowAccumulator, *extra: Any) -> Window:
        window = _close(self, *extra)
        return dataclasses.replace(window, sum_factor=window.sum_factor / factor(self, window))

    return close


def _mean_of_means(self: WindowAccumulator, loss: Tensor, num_samples: Any) -> None:
    """What plain Accelerate does with unequal batches, made into a 'sum' afterwards."""
    typical = self.__dict__.setdefault("_typical", num_samples)
    _backward(self, loss * (typical / num_samples if num_samples else 1.0), num_samples)


def _mean_published(self: GradientDonor, window: Window) -> None:
    factor = window.sum_factor / window.count if window.count else 1.0
    _publish_window(self, dataclasses.replace(window, sum_factor=factor))


def _scale_published(self: GradientDonor, window: Window) -> None:
    factor = window.sum_factor * window.scale
    _publish_window(self, dataclasses.replace(window, sum_factor=factor))


def _stale(self: GradientDonor, record: Record) -> None:
    previous = self.__dict__.get("_previous", record)
    self.__dict__["_previous"] = record
    _load(self, dataclasses.replace(previous, header=record.header))


def _unscaled_injection(self: Injector, tensors: Any, factor: float, w: float) -> None:
    assert self.accelerator.scaler is not None
    _add(self, tensors, factor / float(self.accelerator.scaler.get_scale()), w)


def _on_side(role: Role, has_effect: Callable[[Side], bool]) -> Callable[[Setting], bool]:
    return lambda setting: has_effect(setting.side(role))


def _has_unequal_counts(role: Role) -> Callable[[Setting], bool]:
    """Padding makes all batches equal; their tokens or weights are not."""
    return lambda setting: setting.unit != "samples" or setting.side(role).batches != "padded"


def _has_one_count(setting: Setting) -> bool:
    """Whether all windows of the donor have as many samples: where each is a whole epoch."""
    silo, some = Silo(setting, "donor"), itertools.islice(windows(setting, "donor"), 6)
    return len({count(setting, silo, window) for window in some}) == 1


def _mutations() -> dict[str, Mutation]:
    receiver, donor = GradientReceiver, GradientDonor
    found = {
        "payload halved": Mutation(
            "receiver", Injector, "add_", _times(lambda job: 0.5), is_constant_factor=True
        ),
        "payload twice": Mutation("receiver", Injector, "add_", _twice, is_constant_factor=True),
        "payload without one tensor": Mutation(
            "receiver", Injector, "add_", _payload(_without_one)
        ),
        "two layers swapped": Mutation("receiver", Injector, "add_", _payload(_swapped)),
        "payload times world size": Mutation(
            "receiver", Injector, "add_", _times(lambda job: job.accelerator.num_processes),
            _on_side("receiver", lambda side: side.ranks > 1), is_constant_factor=True,
        ),
        "payload on one rank": Mutation(
            "receiver", Injector, "add_", _on_one_rank,
            _on_side("receiver", lambda side: side.ranks > 1),
        ),
        "clip before the payload": Mutation(
            "receiver", Injector, "add_", clip_before, lambda setting: setting.clip
        ),
        "injection not scaled": Mutation(
            "receiver", Injector, "add_", _unscaled_injection,
            _on_side("receiver", lambda side: side.precision == "fp16"), is_constant_factor=True,
        ),
        "overflowed step taken for a step": Mutation(
            "receiver", receiver, "_step_was_skipped", lambda self, scale: False,
            lambda setting: setting.overflow in ("receiver", "both"),
        ),
        "skip flag of a fused optimizer trusted": Mutation(
            "receiver", receiver, "_step_was_skipped",
            lambda self, scale: bool(self.optimizer.step_was_skipped),
            lambda setting: setting.overflow in ("receiver", "both")
            and "fused" in setting.optimizer,
        ),
        "payload not unscaled": Mutation(
            "donor", donor, "_publish_window", _scale_published,
            _on_side("donor", lambda side: side.precision == "fp16"), is_constant_factor=True,
        ),
        "mean for sum": Mutation(
            "donor", donor, "_publish_window", _mean_published, is_constant_factor=_has_one_count
        ),
        "stale by one": Mutation("donor", donor, "_load", _stale),
    }  # fmt: skip
    roles: tuple[Role, Role] = ("receiver", "donor")
    for role in roles:
        found[f"accumulation forgotten, {role}"] = Mutation(
            role, WindowAccumulator, "close",
            _window(lambda self, window: self._accelerator.gradient_accumulation_steps),
            _on_side(role, lambda side: side.accumulation > 1), is_constant_factor=True,
        )  # fmt: skip
        found[f"world size forgotten, {role}"] = Mutation(
            role, WindowAccumulator, "close",
            _window(lambda self, window: self._accelerator.num_processes),
            _on_side(role, lambda side: side.ranks > 1), is_constant_factor=True,
        )  # fmt: skip
        found[f"mean of means, {role}"] = Mutation(
            role, WindowAccumulator, "backward", _mean_of_means, _has_unequal_counts(role)
        )
    return found


MUTATIONS = _mutations()


def mutations_of(setting: Setting) -> list[str]:
    """The mutations that have an effect in a setting.

    Where a loss overflows, only those are of interest that concern an overflow.
    """
    about_overflow = [name for name, m in MUTATIONS.items() if m.method == "_step_was_skipped"]
    names = MUTATIONS if setting.overflow == "no" else about_overflow
    return [name for name in names if MUTATIONS[name].has_effect(setting)]
