"""The oracle: joint training in one process, and the case that both jobs of a bridge train.

A case says everything: the jobs in ``tests/jobs/bridge_job.py`` and the joint run here build the
same model, the same data and the same uneven batches from it. Even batches would hide wrong
factors, so no two batches of a case need have the same size.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from toolkit.bridge.compression import Compression
from toolkit.bridge.config import Exchange, Scope
from toolkit.bridge.rescaling import LossReduction, RescaleRule

NUM_FEATURES, NUM_CLASSES = 6, {"h1": 3, "h2": 4}
NUM_SAMPLES = {"h1": 83, "h2": 61}
TOPK_RATIO = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One setting of both jobs."""

    optimizer: str = "adamw"
    dtype: str = "float64"
    rescale: RescaleRule = "match"
    loss_reduction: LossReduction = "mean"
    aggregate: str = "sum"  # or "pcgrad" or "mgda"
    scope: Scope = "all"
    donor_weight: float = 0.7
    accumulation: int = 1  # the receiver's
    donor_accumulation: int = 1
    max_grad_norm: float | None = None
    num_steps: int = 50
    prepared: bool = True  # False: the model is not prepared, so that no DDP reduces its gradients
    sharded: str = ""  # "donor", "receiver" or "both": by FSDP2, through Accelerate if prepared
    exchange: Exchange = "gradient"
    local_steps: int = 4  # of exchange "delta"
    outer_learning_rate: float = 0.8
    outer_momentum: float = 0.0
    init_h2: Literal["own", "donor"] = "own"
    max_staleness: int = 0
    compression: Compression = "none"  # "topk" sends TOPK_RATIO of the elements
    donor_pause: float = 0.0  # seconds that the donor sleeps before each window
    mutation: str = ""  # a fault in one of the jobs, see tests/jobs/bridge_job.py
    seed: int = 0

    @property
    def name(self) -> str:
        """The fields that are not the default, for a directory and a test id."""
        changed = [
            f"{field.name}={value}"
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) != field.default
        ]
        return ",".join(changed) or "default"


class Network(nn.Module):
    """A small smooth network: backbone and heads."""

    def __init__(self, heads: tuple[str, ...], dtype: torch.dtype) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Linear(NUM_FEATURES, 8), nn.Tanh(), nn.Linear(8, 5), nn.Tanh()
        )
        self.heads = nn.ModuleDict({head: nn.Linear(5, NUM_CLASSES[head]) for head in heads})
        self.to(dtype)

    def forward(self, features: Tensor, head: str) -> Tensor:
        """Logits of one head."""
        logits: Tensor = self.heads[head](self.backbone(features))
        return logits


def build_network(case: Case, heads: tuple[str, ...] = ("h1", "h2")) -> Network:
    """The network of a case; the receiver and the joint run begin with the same weights."""
    torch.manual_seed(case.seed)
    return Network(heads, getattr(torch, case.dtype))


def build_dataset(case: Case, head: str) -> TensorDataset:
    """The silo that has labels for ``head``."""
    generator = torch.Generator().manual_seed(case.seed + (1 if head == "h1" else 2))
    features = torch.randn(NUM_SAMPLES[head], NUM_FEATURES, generator=generator).double()
    labels = torch.randint(NUM_CLASSES[head], (NUM_SAMPLES[head],), generator=generator)
    return TensorDataset(features.to(getattr(torch, case.dtype)), labels)


def build_optimizer(case: Case, model: nn.Module) -> torch.optim.Optimizer:
    """The receiver's optimizer, over all parameters whether they require a gradient or not."""
    lr = 0.02 if case.loss_reduction == "sum" else 0.2
    if case.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), lr=lr)
    if case.optimizer == "momentum":
        return torch.optim.SGD(model.parameters(), lr=lr / 4, momentum=0.9)
    return torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.05)


class UnevenBatches:
    """Batches of 1 to 9 samples in a new order every epoch; an even number of them.

    The last batch takes what is left. With two ranks every rank gets as many batches as the other
    but not as many samples.
    """

    batch_size = None
    drop_last = False

    def __init__(self, num_samples: int, seed: int) -> None:
        self.num_samples, self.seed, self.epoch = num_samples, seed, 0
        generator = torch.Generator().manual_seed(seed)
        sizes: list[int] = []
        while num_samples - sum(sizes) > 9:
            sizes.append(int(torch.randint(1, 10, (), generator=generator)))
        rest = num_samples - sum(sizes)
        sizes += [rest] if len(sizes) % 2 else [1, rest - 1] if rest > 1 else [rest]
        if len(sizes) % 2:
            first = sizes.pop(next(i for i, size in enumerate(sizes) if size > 1))
            sizes += [first - 1, 1]
        self.sizes = sizes

    def set_epoch(self, epoch: int) -> None:
        """Choose the order."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(1000 * self.seed + self.epoch)
        order = torch.randperm(self.num_samples, generator=generator).tolist()
        start = 0
        for size in self.sizes:
            yield order[start : start + size]
            start += size
        self.epoch += 1


def windows(case: Case, head: str, num_processes: int) -> Iterator[list[int]]:
    """The samples of every optimizer step of one job, over its ranks and micro-steps."""
    accumulation = case.accumulation if head == "h1" else case.donor_accumulation
    batches = UnevenBatches(NUM_SAMPLES[head], case.seed + (7 if head == "h1" else 8))
    per_window = accumulation * num_processes
    epoch = 0
    while True:
        batches.set_epoch(epoch)
        all_batches = list(batches)
        for start in range(0, len(all_batches), per_window):
            yield list(itertools.chain(*all_batches[start : start + per_window]))
        epoch += 1


def summed_loss(model: nn.Module, dataset: TensorDataset, indices: list[int], head: str) -> Tensor:
    """Sum over ``indices`` of one head's loss."""
    features, labels = dataset[indices]
    return F.cross_entropy(model(features, head), labels, reduction="sum")


def combine_by_hand(rule: str, own: Tensor, donor: Tensor) -> Tensor:
    """One gradient of two, as vectors, by the rule's definition."""
    if rule == "mgda":  # the point of the segment between them that is nearest to the origin
        across = own - donor
        share = float(-(donor @ across) / (across @ across))
        return donor + min(max(share, 0.0), 1.0) * across
    assert rule == "pcgrad"
    if own @ donor >= 0:
        return own + donor
    own_projected = own - (own @ donor) / (donor @ donor) * donor
    return own_projected + donor - (donor @ own) / (own @ own) * own


def compress_by_hand(compression: str, total: Tensor, left: Tensor, count: int) -> Tensor:
    """What crosses of a gradient sum over ``count`` samples, as a vector.

    Args:
        compression: of the case.
        total: the sum.
        left: what was left out of the means so far; brought up to date.
        count: the samples.
    """
    if compression == "bf16":
        return total.bfloat16().to(total.dtype)
    wanted = total + count * left
    places = wanted.abs().topk(math.ceil(TOPK_RATIO * len(wanted))).indices
    sent = torch.zeros_like(wanted)
    sent[places] = wanted[places].bfloat16().to(wanted.dtype)
    left.copy_((wanted - sent) / count)
    return sent


def _take_grads(parameters: list[nn.Parameter]) -> Tensor:
    """All gradients as one vector; afterwards there are none."""
    vector = nn.utils.parameters_to_vector([p.grad for p in parameters if p.grad is not None])
    for parameter in parameters:
        parameter.grad = None
    return vector


def _put_grads(parameters: list[nn.Parameter], vector: Tensor) -> None:
    pieces = vector.split([parameter.numel() for parameter in parameters])
    for parameter, piece in zip(parameters, pieces, strict=True):
        parameter.grad = piece.view_as(parameter).clone()


def train_jointly(
    case: Case,
    num_receiver: int = 1,
    num_donor: int = 1,
    splits: int = 1,
    lost_windows: frozenset[int] = frozenset(),
) -> dict[str, Tensor]:
    """Train in one process on both data sets and return the final weights.

    The gradients' weights are written out here by hand, apart from the bridge's own arithmetic.

    Args:
        case: the setting.
        num_receiver: ranks of the receiver whose batches are to be repeated.
        num_donor: ranks of the donor, likewise.
        splits: parts that every batch is split into and accumulated, for the noise floor.
        lost_windows: numbers of the donor's windows that never arrive.
    """
    model = build_network(case)
    optimizer = build_optimizer(case, model)
    data = {head: build_dataset(case, head) for head in ("h1", "h2")}
    arriving = (
        window
        for number, window in enumerate(windows(case, "h2", num_donor))
        if number not in lost_windows
    )
    streams = zip(windows(case, "h1", num_receiver), arriving, strict=False)
    donated = [*model.backbone.parameters(), *model.heads["h2"].parameters()]
    left = torch.zeros_like(nn.utils.parameters_to_vector(donated)).detach()
    for _, (own, donor) in zip(range(case.num_steps), streams, strict=False):
        n_r, n_d, lam = len(own), len(donor), case.donor_weight
        weights = {
            ("match", "mean"): (1 / n_r, lam / n_d),
            ("match", "sum"): (1.0, lam * n_r / n_d),
            ("append", "mean"): (1 / n_r, lam / n_r),
            ("append", "sum"): (1.0, lam),
            ("pool", "mean"): (1 / (n_r + n_d), lam / (n_r + n_d)),
        }[case.rescale, case.loss_reduction]
        optimizer.zero_grad()
        backbone = list(model.backbone.parameters())
        vectors = []
        for head, indices, weight in (("h1", own, weights[0]), ("h2", donor, weights[1])):
            for part in range(splits):
                if indices[part::splits]:
                    loss = summed_loss(model, data[head], indices[part::splits], head) * weight
                    if head == "h2" and case.compression != "none":
                        kept = [p.grad for p in donated]
                        for parameter in donated:
                            parameter.grad = None
                        (loss / weight).backward()
                        sent = compress_by_hand(case.compression, _take_grads(donated), left, n_d)
                        _put_grads(donated, weight * sent)
                        for parameter, grad in zip(donated, kept, strict=True):
                            if grad is not None and parameter.grad is not None:
                                parameter.grad += grad
                    elif head == "h2" and case.scope == "head":
                        parameters = list(model.heads["h2"].parameters())
                        loss.backward(inputs=parameters)
                    else:
                        loss.backward()
            if case.aggregate != "sum":
                vectors.append(_take_grads(backbone))
        if vectors:
            _put_grads(backbone, combine_by_hand(case.aggregate, *vectors))
        if case.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), case.max_grad_norm)
        optimizer.step()
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def train_with_deltas(case: Case, num_receiver: int, num_donor: int) -> dict[str, Tensor]:
    """Both jobs of exchange ``delta`` in one process, by hand: the receiver's final weights."""
    model, donor = build_network(case), build_network(case)
    optimizer = build_optimizer(case, model)
    donor_optimizer = build_optimizer(case, nn.ModuleList([donor.backbone, donor.heads["h2"]]))
    data = {head: build_dataset(case, head) for head in ("h1", "h2")}
    own, donated = windows(case, "h1", num_receiver), windows(case, "h2", num_donor)
    shared = {n: p for n, p in model.named_parameters() if not n.startswith("heads.h1")}
    momentum = {name: torch.zeros_like(p) for name, p in shared.items()}

    def step(net: Network, optim: torch.optim.Optimizer, head: str, indices: list[int]) -> None:
        optim.zero_grad()
        (summed_loss(net, data[head], indices, head) / len(indices)).backward()
        if case.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(optim.param_groups[0]["params"], case.max_grad_norm)
        optim.step()

    for _ in range(case.num_steps // case.local_steps):
        start = {name: p.detach().clone() for name, p in shared.items()}
        donor.load_state_dict(start, strict=False)
        for _ in range(case.local_steps):
            step(model, optimizer, "h1", next(own))
            step(donor, donor_optimizer, "h2", next(donated))
        with torch.no_grad():
            for name, parameter in shared.items():
                change = case.donor_weight * (donor.get_parameter(name) - start[name])
                momentum[name] = case.outer_momentum * momentum[name] + change
                update = change + case.outer_momentum * momentum[name]
                parameter.add_(case.outer_learning_rate * update)
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def train_with_head(
    case: Case, num_receiver: int, num_donor: int, payloads: list[int | None]
) -> dict[str, Tensor]:
    """Exchange ``head`` in one process, by hand: the receiver's final weights.

    Args:
        case: the setting.
        num_receiver: ranks of the receiver.
        num_donor: ranks of the donor.
        payloads: for every step, the donor's window whose gradient it takes.
    """
    model, donor = build_network(case), build_network(case, ("h2",))
    optimizer, donor_optimizer = build_optimizer(case, model), build_optimizer(case, donor)
    if case.init_h2 == "donor":
        model.heads["h2"].load_state_dict(donor.heads["h2"].state_dict())
    data = {head: build_dataset(case, head) for head in ("h1", "h2")}
    donated: list[list[Tensor]] = []
    num_donated = 1 + max(payload or 0 for payload in payloads)
    for indices in itertools.islice(windows(case, "h2", num_donor), num_donated):
        donor_optimizer.zero_grad()
        loss = summed_loss(donor, data["h2"], indices, "h2") / len(indices)
        donated.append(list(torch.autograd.grad(loss, list(donor.parameters()))))
        for parameter, grad in zip(donor.parameters(), donated[-1], strict=True):
            parameter.grad = grad
        donor_optimizer.step()
    head = list(model.heads["h2"].parameters())
    for payload, indices in zip(payloads, windows(case, "h1", num_receiver), strict=False):
        optimizer.zero_grad()
        (summed_loss(model, data["h1"], indices, "h1") / len(indices)).backward()
        if payload is not None:
            for parameter, grad in zip(head, donated[payload][-len(head) :], strict=True):
                parameter.grad = case.donor_weight * grad
        optimizer.step()
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def largest_difference(a: dict[str, Any], b: dict[str, Any]) -> float:
    """max |a - b| over all tensors; infinite for NaN or unequal names."""
    if set(a) != set(b):
        return math.inf
    worst = [float((a[name].double() - b[name].double()).abs().max()) for name in a]
    # one by one: max() passes over a NaN that is not the first
    return max(worst) if all(map(math.isfinite, worst)) else math.inf
