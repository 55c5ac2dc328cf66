"""How donors' gradient sums join the receiver's own in ``.grad``."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from toolkit.aggregation import find_rule, guarded_weights
from toolkit.bridge.accumulation import Window, scale_grads_
from toolkit.bridge.config import BridgeConfig
from toolkit.bridge.control import ControlGroup
from toolkit.bridge.measures import (
    aggregation_metrics,
    donor_metrics,
    inner_products,
    own_metrics,
    staleness_metrics,
)
from toolkit.bridge.payload import Record
from toolkit.bridge.rescaling import rescale_factors
from toolkit.bridge.staleness import COMPENSATION, WeightHistory, compensate, damping
from toolkit.parameters import SharedParameters
from toolkit.sharding import shard_like


class Injector:
    """Makes ``.grad`` the gradient of the joint step, alike on every rank.

    Args:
        accelerator: the job's accelerator.
        parameters: all of the model's.
        shared: those that donors have gradients for.
        control: the job's control group.
        config: the rules.

    Attributes:
        needs_older_weights: whether a payload is of use only with the weights it was taken at.

    Raises:
        ValueError: if ``config.donor_weight`` names heads, and not these.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        parameters: Collection[nn.Parameter],
        shared: SharedParameters,
        control: ControlGroup,
        config: BridgeConfig,
    ) -> None:
        self.accelerator, self.parameters, self.shared = accelerator, parameters, shared
        self._control, self._config = control, config
        self._weights = config.weights_of(shared.heads)
        self._rule = None if config.aggregate == "sum" else find_rule(config.aggregate)
        self._history = WeightHistory(
            shared, config.max_staleness if config.has_stale_gradients else 0
        )
        self.needs_older_weights = config.stale in COMPENSATION

    def inject(
        self, window: Window, records: Sequence[Record], receiver_step: int
    ) -> dict[str, float]:
        """Rescale the receiver's own gradients and add the donors'. A collective.

        Args:
            window: the receiver's, closed.
            records: this step's payloads, of several donors.
            receiver_step: the receiver's completed steps.

        Returns:
            What was done, as plain floats by tag.
        """
        config, counts = self._config, dict.fromkeys(self.shared.heads, 0.0)
        for record in records:
            counts[record.header.head] += record.header.count
        self._history.remember(receiver_step)
        own_factor, donor_factors = rescale_factors(
            config.rescale, config.loss_reduction, window.count, counts, self._weights
        )
        scale_grads_(self.parameters, window.sum_factor * own_factor)
        metrics = {"bridge/samples own (samples)": window.count}
        if not records:
            return metrics
        sums = [self._placed(record) for record in records]
        factors = [donor_factors[record.header.head] for record in records]
        metrics |= self._treat_stale(records, sums, factors, receiver_step)
        backbone, heads = inner_products(
            self.parameters, self.shared.backbone, sums, self._control,
            [1 / window.scale, *factors],
        )  # fmt: skip
        if config.max_donor_norm is not None:
            shrinking = self._bounded(backbone, heads)
            factors = [factor * shrink for factor, shrink in zip(factors, shrinking, strict=True)]
        metrics |= own_metrics(backbone, heads)
        for place, (record, factor) in enumerate(zip(records, factors, strict=True), 1):
            metrics |= donor_metrics(place, backbone, heads, window, record, factor)
        own_weight, *weights = self.weigh(backbone)
        if self._rule is not None:
            names = ["own", *(record.header.job for record in records)]
            metrics |= aggregation_metrics(backbone, names, [own_weight, *weights])
        if own_weight != 1.0:
            scale_grads_(self.shared.backbone.values(), own_weight)
        for tensors, factor, weight in zip(sums, factors, weights, strict=True):
            self.add_(tensors, factor * window.scale, weight)
        return metrics

    def forget_weights(self) -> None:
        """Other weights have been loaded: the older versions kept are not of their past."""
        self._history.clear()

    def _treat_stale(
        self,
        records: Sequence[Record],
        sums: list[dict[str, Tensor]],
        factors: list[float],
        receiver_step: int,
    ) -> dict[str, float]:
        """Do to the sums of older weights, or their factors, as ``config.stale`` says.

        A collective where parameters are sharded.

        Returns:
            The staleness of each payload, by tag.
        """
        config, ages, weights = self._config, [], []
        if not config.follows:  # the donors' weights are their own, and have no such age
            return {}
        for place, record in enumerate(records):
            header = record.header
            age = receiver_step - header.receiver_step
            since = self._history.since(header.receiver_step, header.head)
            if config.stale == "damp":
                factors[place] *= damping(age)
            elif self.needs_older_weights:
                assert since is not None, f"no weights of step {header.receiver_step} are kept"
                strength = config.compensation or COMPENSATION[config.stale]
                adaptive = config.stale == "compensate_adaptive"
                sums[place] = compensate(sums[place], header.count, since, strength, adaptive)
            ages.append(age)
            weights.append(since)
        return staleness_metrics([r.header.job for r in records], ages, weights, self._control)

    def _placed(self, record: Record) -> dict[str, Tensor]:
        """A payload's tensors where their parameters are, without those of frozen parameters."""
        return {
            name: shard_like(record.tensors[name].to(parameter.device, parameter.dtype), parameter)
            for name, parameter in self.shared.trained.items()
            if name in record.tensors
        }

    def _bounded(self, backbone: Tensor, heads: list[float]) -> list[float]:
        """Shrink the donors' parts of a step to ``config.max_donor_norm``. A collective.

        Args:
            backbone: the Gramian of all parts, the receiver's first; is changed in place.
            heads: squared norms of their parts elsewhere; are changed in place.

        Returns:
            The factor of each donor's part, at most 1; the main process's on every rank.
        """
        bound = self._config.max_donor_norm
        assert bound is not None
        norms = (backbone.diagonal() + torch.tensor(heads, dtype=torch.float64)).sqrt()
        shrink = self._control.on_main(lambda: (bound / norms).clamp(max=1.0).tolist())
        shrink[0] = 1.0  # the receiver's own
        factors = torch.tensor(shrink, dtype=torch.float64)
        backbone.mul_(torch.outer(factors, factors))
        heads[:] = (torch.tensor(heads, dtype=torch.float64) * factors.square()).tolist()
        return shrink[1:]

    def weigh(self, backbone: Tensor) -> list[float]:
        """Weights of all parts on the backbone, from their Gramian. A collective but for sums.

        The parts are what a sum would add: rescaled, the donors' times ``donor_weight``. The
        heads keep what they get as it is, as is usual for parameters of one task. The main process
        decides, so that ranks cannot differ by rounding.

        Args:
            backbone: the Gramian, the receiver's part first.
        """
        if self._rule is None:
            return [1.0] * len(backbone)
        rule = self._rule
        return self._control.on_main(lambda: guarded_weights(rule, backbone).tolist())

    def add_(self, tensors: Mapping[str, Tensor], factor: float, backbone_weight: float) -> None:
        """Add ``factor`` times a donor's sum to ``.grad``; identical on every rank.

        Args:
            tensors: the sum, by name, like the parameters in device and dtype.
            factor: of all of it.
            backbone_weight: a further factor of the backbone's.
        """
        parameters = self.shared.parameters
        for name, tensor in tensors.items():
            parameter = parameters[name]
            weight = factor * backbone_weight if name in self.shared.backbone else factor
            if parameter.grad is None:
                # a copy: after a skipped step the sum is used again
                parameter.grad = tensor * weight
            else:
                parameter.grad.add_(tensor, alpha=weight)
