"""One setting of both jobs: model, data, batches and optimizer, from which job and oracle begin.

What a step does with them is not here: the job (``job.py``) leaves it to the bridge, the oracle
(``joint.py``) writes it out by hand.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from toolkit.bridge.config import Role, Scope
from toolkit.bridge.rescaling import LossReduction, RescaleRule

NUM_FEATURES, WIDTH = (
    6,
    5,
)  # two like layers in the backbone and two in h2, so that they can be swapped
NUM_SAMPLES: dict[Role, int] = {"receiver": 83, "donor": 61}
NUM_BATCHES: dict[Role, int] = {
    "receiver": 7,
    "donor": 5,
}  # an epoch, on each rank; no multiple of 3
NUM_TOKENS = 3
NO_LABEL = -100
HEAD: dict[Role, str] = {"receiver": "h1", "donor": "h2"}
FROZEN = "backbone.layers.0.weight"
MAX_GRAD_NORM, WEIGHT_DECAY, EMA_DECAY = 0.05, 0.05, 0.9
INIT_SCALE, GROWTH_INTERVAL = 2.0**10, 12  # of the loss scaler

Batches = Literal["last short", "ragged", "drifting", "empty", "padded"]
Precision = Literal["no", "bf16", "fp16"]
Forward = Literal["plain", "checkpointed", "compiled", "inductor"]
Wrapper = Literal["ddp", "static_graph", "bucket_view", "fsdp2", "none"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Side:
    """What each job can have apart from the other."""

    ranks: int = 1
    batches: Batches = "ragged"
    accumulation: int = 1
    precision: Precision = "no"
    forward: Forward = "plain"
    wrapper: Wrapper = "ddp"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """One case of the matrix."""

    receiver: Side = Side()
    donor: Side = Side()
    dtype: str = "float64"
    loss_reduction: LossReduction = "mean"
    unit: str = "samples"  # or "tokens" or "weights"
    optimizer: str = "adamw"
    clip: bool = False
    weight_decay: bool = False
    schedule: bool = False
    norm: str = "no"  # or "layer" (or "batch", which cannot be exact)
    dropout: str = "no"  # or "by sample" (or "stream", which cannot be exact)
    tied: str = "no"  # or "backbone" or "head"
    frozen: str = "no"  # or the job in which a layer of the backbone is, or "both"
    rescale: RescaleRule = "match"
    scope: Scope = "all"
    ema: bool = False
    overflow: str = "no"  # or "donor" or "receiver" or "both"
    donor_weight: float = 0.7
    num_steps: int = 50
    seed: int = 0

    @property
    def worlds(self) -> tuple[int, int]:
        """Ranks of the receiver and of the donor."""
        return self.receiver.ranks, self.donor.ranks

    def side(self, role: Role) -> Side:
        """The setting of one job."""
        return self.receiver if role == "receiver" else self.donor


def to_json(setting: Setting) -> dict[str, Any]:
    """A setting as plain values."""
    return dataclasses.asdict(setting)


def from_json(fields: dict[str, Any]) -> Setting:
    """The inverse of :func:`to_json`."""
    sides = {role: Side(**fields[role]) for role in ("receiver", "donor")}
    return Setting(**{**fields, **sides})


# -- the model ------------------------------------------------------------------------------------


class SampleDropout(nn.Module):
    """Drops one value in four; which ones is a function of the sample, not of a random stream."""

    def forward(self, values: Tensor, keys: Tensor) -> Tensor:
        """``values`` of shape (samples, tokens, width), ``keys`` of shape (samples)."""
        columns = torch.arange(values.shape[-1])
        kept = (keys[:, None, None] * 7 + columns * 5) % 4 != 0
        return values * kept / 0.75


class Backbone(nn.Module):
    """Two like layers over a first one."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        layers = [nn.Linear(NUM_FEATURES, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)]
        self.layers = nn.ModuleList(layers)
        if setting.tied == "backbone":
            layers[2].weight = layers[1].weight
        norms = {"no": nn.Identity, "layer": nn.LayerNorm, "batch": nn.BatchNorm1d}
        self.norm: nn.Module = norms[setting.norm](WIDTH)
        self.by_sample = SampleDropout() if setting.dropout == "by sample" else None
        self.stream = nn.Dropout(0.25 if setting.dropout == "stream" else 0.0)
        self.is_checkpointed = False

    def forward(self, features: Tensor, keys: Tensor) -> Tensor:
        """Features of shape (samples, tokens, width)."""
        hidden = torch.tanh(self.layers[0](features))
        if self.is_checkpointed:
            out: Tensor = checkpoint(self._rest, hidden, keys, use_reentrant=False)
            return out
        return self._rest(hidden, keys)

    def _rest(self, hidden: Tensor, keys: Tensor) -> Tensor:
        hidden = self.layers[1](hidden)
        hidden = torch.tanh(self.norm(hidden.flatten(0, 1)).view_as(hidden))
        if self.by_sample is not None:
            hidden = self.by_sample(hidden, keys)
        return torch.tanh(self.layers[2](self.stream(hidden)))


class Network(nn.Module):
    """Backbone and heads."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.backbone = Backbone(setting)
        second = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
        self.heads = nn.ModuleDict({"h1": nn.Linear(WIDTH, WIDTH), "h2": second})
        if setting.tied == "head":
            self.heads["h1"].weight = self.backbone.layers[1].weight
        self.to(getattr(torch, setting.dtype))

    def forward(self, features: Tensor, keys: Tensor, head: str) -> Tensor:
        """Logits of one head, (samples, tokens, classes)."""
        logits: Tensor = self.heads[head](self.backbone(features, keys))
        return logits


def build_network(setting: Setting) -> Network:
    """Both jobs and the oracle begin with the same weights."""
    torch.manual_seed(setting.seed)
    return Network(setting)


def build_optimizer(setting: Setting, model: nn.Module, form: str = "") -> torch.optim.Optimizer:
    """The receiver's optimizer, over all parameters.

    Args:
        setting: names it, such as ``sgd`` or ``adamw fused``.
        model: whose parameters it takes.
        form: ``plain`` for one parameter after the other, whatever the setting says.
    """
    name, _, own_form = setting.optimizer.partition(" ")
    parameters = list(model.parameters())
    lr = 0.2 if setting.loss_reduction == "mean" else 0.005
    decay = WEIGHT_DECAY if setting.weight_decay else 0.0
    forms: dict[str, Any] = {
        "foreach": {"foreach": True}, "fused": {"fused": True}, "": {}, "plain": {"foreach": False},
    }[form or own_form]  # fmt: skip
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=0.01, weight_decay=decay, **forms)
    if name == "adafactor":
        return torch.optim.Adafactor(parameters, lr=0.01, weight_decay=decay, **forms)
    momentum = {"sgd": 0.0, "momentum": 0.9, "nesterov": 0.9}[name]
    return torch.optim.SGD(
        parameters, lr=lr / 4 if momentum else lr, momentum=momentum, weight_decay=decay,
        nesterov=name == "nesterov", **forms,
    )  # fmt: skip


def learning_rate_factor(setting: Setting, completed_steps: int) -> float:
    """The schedule."""
    return 1.0 / (1.0 + 0.1 * completed_steps) if setting.schedule else 1.0


# -- the data -------------------------------------------------------------------------------------


class Silo(torch.utils.data.Dataset[Any]):
    """One job's samples: features, labels by token, a weight, and the sample's number."""

    def __init__(self, setting: Setting, role: Role) -> None:
        generator = torch.Generator().manual_seed(setting.seed + (1 if role == "receiver" else 2))
        count, tokens = NUM_SAMPLES[role], NUM_TOKENS if setting.unit == "tokens" else 1
        features = torch.randn(count, tokens, NUM_FEATURES, generator=generator).double()
        self.features = features.to(getattr(torch, setting.dtype))
        self.labels = torch.randint(WIDTH, (count, tokens), generator=generator)
        if setting.unit == "tokens":
            self.labels[torch.rand(count, tokens, generator=generator) < 0.4] = NO_LABEL
        self.weights = torch.ones(count, dtype=self.features.dtype)
        if setting.unit == "weights":
            self.weights = torch.rand(count, generator=generator).to(self.features.dtype) + 0.1

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> int:
        return index

    def collate(self, indices: list[int]) -> dict[str, Tensor]:
        """A batch, which may be empty."""
        keys = torch.tensor(indices, dtype=torch.long)
        return {
            "features": self.features[keys],
            "labels": self.labels[keys],
            "weights": self.weights[keys],
            "keys": keys,
        }


def epoch_batches(setting: Setting, role: Role, epoch: int) -> list[list[int]]:
    """The samples of every batch of an epoch, over all ranks in turn, before any padding."""
    side, count = setting.side(role), NUM_SAMPLES[role]
    generator = torch.Generator().manual_seed(1000 * (setting.seed + len(role)) + epoch)
    order = torch.randperm(count, generator=generator).tolist()
    if side.batches in ("last short", "padded"):
        size = fixed_batch_size(setting, role)
        return [order[start : start + size] for start in range(0, count, size)]
    number = NUM_BATCHES[role] * side.ranks + (side.batches == "drifting")
    sizes = _ragged_sizes(setting.seed + len(role), count, number, side.batches == "empty")
    starts = [sum(sizes[:i]) for i in range(number)]
    return [order[start : start + size] for start, size in zip(starts, sizes, strict=True)]


def _ragged_sizes(seed: int, count: int, number: int, with_empty: bool) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    filled = number - 2 if with_empty else number
    cuts = (torch.randperm(count - 1, generator=generator)[: filled - 1] + 1).sort().values.tolist()
    sizes = [b - a for a, b in zip([0, *cuts], [*cuts, count], strict=True)]
    return [*sizes[:2], 0, *sizes[2:], 0] if with_empty else sizes


def fixed_batch_size(setting: Setting, role: Role) -> int:
    """The largest batch size whose last batch is short and whose last window of three is too."""
    side, count = setting.side(role), NUM_SAMPLES[role]
    for size in range(14, 1, -1):
        number = -(-count // size)
        on_each_rank = -(-number // side.ranks)
        is_padded = bool(number % side.ranks)
        wants_padding = side.batches == "padded"
        if count % size and on_each_rank % 3 and is_padded == wants_padding:
            return size
    raise ValueError(f"no batch size fits {side} and {count} samples")


class BatchSampler:
    """What a job's dataloader gets: all ranks' batches, of which Accelerate takes every Wth."""

    drop_last = False

    def __init__(self, setting: Setting, role: Role) -> None:
        self.setting, self.role, self.epoch = setting, role, 0
        is_padded = setting.side(role).batches == "padded"
        self.batch_size = fixed_batch_size(setting, role) if is_padded else None

    def set_epoch(self, epoch: int) -> None:
        """Choose the order."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(epoch_batches(self.setting, self.role, 0))

    def __iter__(self) -> Iterator[list[int]]:
        yield from epoch_batches(self.setting, self.role, self.epoch)
        self.epoch += 1
