"""The settings of a bridge, the same class for donor and receiver."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

from toolkit.aggregation import find_rule
from toolkit.bridge.compression import COMPRESSIONS, Compression
from toolkit.bridge.rescaling import LossReduction, RescaleRule, check_rule

Exchange = Literal["auto", "gradient", "delta", "distill", "head"]
DistillLoss = Literal["kl", "mse"]
Scope = Literal["all", "head"]
Role = Literal["donor", "receiver"]
AlarmRule = Literal["warn", "reject"]
FrozenRule = Literal["rest", "cross"]
StaleRule = Literal["apply", "damp", "compensate", "compensate_adaptive"]
EXCHANGES: tuple[Exchange, ...] = get_args(Exchange)
DISTILL_LOSSES: tuple[DistillLoss, ...] = get_args(DistillLoss)
SCOPES: tuple[Scope, ...] = get_args(Scope)
ALARM_RULES: tuple[AlarmRule, ...] = get_args(AlarmRule)
FROZEN_RULES: tuple[FrozenRule, ...] = get_args(FrozenRule)
STALE_RULES: tuple[StaleRule, ...] = get_args(StaleRule)
TAKEN_NAMES = ("receiver", "bridge", "heads")  # of other directories of a run
JOB_NAME = re.compile(r"[A-Za-z][\w-]*")
_ONLY_OF: Mapping[str, tuple[Exchange, ...]] = {  # settings that other exchanges do not look at
    "frozen": ("auto", "gradient", "delta"),
    "stale": ("auto", "gradient"),
    "on_alarm": ("auto", "gradient", "delta", "head"),
    "max_donor_norm": ("auto", "gradient", "head"),
    "compression": ("auto", "gradient", "delta", "head"),
    "publish_every": ("distill", "head"),
    "init_h2": ("head",),
    "local_steps": ("delta",),
    "outer_learning_rate": ("delta",),
    "outer_momentum": ("delta",),
    "distill_loss": ("auto", "distill"),
    "temperature": ("auto", "distill"),
}


@dataclasses.dataclass(kw_only=True, slots=True)
class BridgeConfig:
    """How two jobs are joined. Every field has a default that trains as one job would.

    Raises:
        ValueError: for a value out of range or a contradiction, naming both.
    """

    runs_dir: str | Path = "runs"  # the directory that the jobs share
    run: str | None = None  # attach to this run of it; None: the newest that waits for this job
    resume_from_checkpoint: str | Path | None = None  # reattach to the run of this checkpoint
    key_file: str | Path | None = None  # holds the key of both jobs; GRADIENT_BRIDGE_KEY too may
    # What crosses. At the receiver's weights: gradients, or the difference that local steps make
    # (delta). At the donor's own: its weights (distill), or gradients of its head (head). auto:
    # gradients, and a teacher where no donor is there.
    exchange: Exchange = "auto"
    scope: Scope = "all"  # what of it: backbone and head, or the head's only
    # What is frozen of the backbone when a job begins: it must be the same in all jobs and is
    # compared once ("rest"), or it crosses with the weights as if it were not frozen ("cross").
    frozen: FrozenRule = "rest"
    max_staleness: int = 0  # receiver steps that a payload may come late; 0: lockstep
    stale: StaleRule = "apply"  # receiver: what becomes of one that comes late (staleness.py)
    compensation: float | None = None  # lambda of "compensate" (None: 0.04), or "..._adaptive" (2)
    publish_every: int | Literal["epoch"] = 1  # distill, head: donor's steps between payloads
    compression: Compression = "none"  # donor: of its payloads (compression.py)
    topk_ratio: float = 0.01  # donor: share of a payload's elements that "topk" sends
    init_h2: Literal["own", "donor"] = "own"  # head, receiver: the head that it begins with
    local_steps: int = 32  # delta: steps of either job between two exchanges
    outer_learning_rate: float = 1.0  # delta, receiver: of the outer step
    outer_momentum: float = 0.0  # delta, receiver: Nesterov momentum of the outer step
    distill_loss: DistillLoss = "kl"  # auto, distill, receiver: how far it is from its teacher
    temperature: float = 4.0  # auto, distill, receiver: that classes are softened by in "kl"
    rescale: RescaleRule = "match"  # how the donor's sum meets the receiver's batch
    donor_weight: float | Mapping[str, float] = 1.0  # lambda of the donors' losses, or by head
    donor_name: str = "donor"  # donor: its name in the run; several donors have different ones
    # The names of a head's classes, by number: two jobs that both state them must state the same.
    class_names: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    num_donors: int = 1  # receiver: how many it waits for before its first step
    max_donor_norm: float | None = None  # receiver: bound of each donor's part of the gradient
    on_alarm: AlarmRule = "warn"  # receiver: what of payloads that are valid and strange (sentinel)
    aggregate: str = "sum"  # receiver: how both gradients of the backbone become one
    loss_reduction: LossReduction = "mean"  # what the loss is, and what the step uses
    unit: str = "samples"  # what num_samples counts
    peer_wait: float = 60.0  # seconds without a sign of life from the other job; then go on alone
    require_peer: bool = False  # end with an error instead of going on alone
    payload_budget_files: int = 100_000  # unacknowledged payloads that a donor keeps, at most
    payload_budget_gib: float = 50.0  # and their size, GiB
    checkpoint_interval: int | None = None  # receiver: steps between checkpoints
    checkpoints_kept: int | None = None  # receiver: checkpoints kept; None: all
    keep_payloads: bool = False  # receiver: keep every payload that it applies, for a replay
    replay: str | Path | None = None  # receiver: no donor, the kept payloads of this finished run

    def __post_init__(self) -> None:
        check_rule(self.rescale, self.loss_reduction)
        if self.scope not in SCOPES:
            raise ValueError(f"scope {self.scope!r} is unknown; choose one of {list(SCOPES)}")
        if self.frozen not in FROZEN_RULES:
            raise ValueError(
                f"frozen {self.frozen!r} is unknown; choose one of {list(FROZEN_RULES)}"
            )
        find_rule(self.aggregate)
        if self.aggregate != "sum" and self.scope == "head":
            raise ValueError(
                f"aggregate {self.aggregate!r} weighs two gradients of the backbone, and with "
                "scope 'head' the donor's does not cross: use scope 'all', or aggregate 'sum'"
            )
        if self.exchange not in EXCHANGES:
            raise ValueError(
                f"exchange {self.exchange!r} is unknown; choose one of {list(EXCHANGES)}"
            )
        for name, exchanges in _ONLY_OF.items():
            if self.exchange not in exchanges:
                self._check_default(name, f"it is of exchange {' and '.join(map(repr, exchanges))}")
        if self.exchange == "delta":
            self._check_delta()
        if self.exchange == "distill":
            self._check_distill()
        if self.has_teachers:
            self._check_teachers()
        if self.exchange == "head":
            self.scope = "head"
        self._check_own_weights()
        self._check_payload_rules()
        if self.max_staleness < 0:
            raise ValueError(f"max_staleness must not be negative, got {self.max_staleness}")
        self._check_stale()
        weight = self.donor_weight
        for value in weight.values() if isinstance(weight, Mapping) else (weight,):
            if not 0 <= value < math.inf:
                raise ValueError(f"donor_weight must be finite, not negative: got {value}")
        if not JOB_NAME.fullmatch(self.donor_name) or self.donor_name in TAKEN_NAMES:
            raise ValueError(
                f"donor_name {self.donor_name!r} must begin with a letter and have letters, "
                f"digits, _ and - only; {' and '.join(TAKEN_NAMES)} are taken"
            )
        for head, names in self.class_names.items():
            if isinstance(names, str) or not names or {type(name) for name in names} != {str}:
                raise ValueError(f"class_names of {head!r} must be a list of names: {names!r}")
        if self.num_donors < 1:
            raise ValueError(f"num_donors must be at least 1, got {self.num_donors}")
        for name in ("peer_wait", "payload_budget_files", "payload_budget_gib"):
            value = getattr(self, name)
            if not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        for name in ("checkpoint_interval", "checkpoints_kept"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, or None, got {value}")
        if self.replay is not None:
            self._check_replay(Path(self.replay))
        if self.run is not None and self.resume_from_checkpoint is not None:
            raise ValueError(
                f"run {self.run!r} and resume_from_checkpoint {str(self.resume_from_checkpoint)!r} "
                "exclude each other: a checkpoint knows its run; give one of them"
            )

    def _check_payload_rules(self) -> None:
        if self.compression not in COMPRESSIONS:
            raise ValueError(
                f"compression {self.compression!r} is unknown; choose one of {list(COMPRESSIONS)}"
            )
        if not 0 < self.topk_ratio <= 1:
            raise ValueError(f"topk_ratio must be above 0 and at most 1, got {self.topk_ratio}")
        if self.compression != "topk":
            self._check_default("topk_ratio", "it is of compression 'topk'", "compression")
        if self.on_alarm not in ALARM_RULES:
            raise ValueError(
                f"on_alarm {self.on_alarm!r} is unknown; choose one of {list(ALARM_RULES)}"
            )
        if self.max_donor_norm is not None and not 0 < self.max_donor_norm < math.inf:
            raise ValueError(
                f"max_donor_norm must be positive and finite, or None, got {self.max_donor_norm}"
            )

    def _check_stale(self) -> None:
        if self.stale not in STALE_RULES:
            raise ValueError(f"stale {self.stale!r} is unknown; choose one of {list(STALE_RULES)}")
        if self.compensation is not None:
            if not self.stale.startswith("compensate"):
                raise ValueError(
                    f"compensation {self.compensation} is lambda of stale 'compensate' and "
                    f"'compensate_adaptive', and stale is {self.stale!r}"
                )
            if not 0 < self.compensation < math.inf:
                raise ValueError(
                    f"compensation must be finite and positive, got {self.compensation}"
                )
        if self.stale == "apply":
            return
        if not self.max_staleness:
            raise ValueError(
                f"stale {self.stale!r} is about gradients at weights that are 1 to max_staleness "
                "steps old, and max_staleness is 0: set it to 1 or more, or use stale 'apply'"
            )

    def _check_own_weights(self) -> None:
        every = self.publish_every
        if every != "epoch" and (isinstance(every, str) or every < 1):
            raise ValueError(f"publish_every must be a number of at least 1, or 'epoch': {every!r}")
        if self.init_h2 not in ("own", "donor"):
            raise ValueError(f"init_h2 must be 'own' or 'donor', got {self.init_h2!r}")
        if self.init_h2 == "donor" and self.keep_payloads:
            raise ValueError(
                "keep_payloads and init_h2 'donor' exclude each other: a replay has no donor to "
                "take the first weights from"
            )

    @property
    def follows(self) -> bool:
        """Whether the donor works at the receiver's weights, and not at its own."""
        return self.exchange in ("auto", "gradient", "delta")

    @property
    def has_teachers(self) -> bool:
        """Whether a receiver may learn from a donor's weights on its own inputs."""
        return self.exchange in ("auto", "distill")

    @property
    def has_own_weights(self) -> bool:
        """Whether a donor publishes weights that it has trained by itself."""
        return self.exchange in ("auto", "distill", "head")

    @property
    def no_stand_in(self) -> str | None:
        """Exchange ``auto``: why a receiver with these settings has no teachers; None if it may."""
        if self.exchange != "auto":
            return None
        if self.keep_payloads or self.replay is not None:
            return "what it teaches is in no payload, so that the run could not be replayed"
        if self.scope == "head":
            return "its loss would move the backbone too, and scope is 'head'"
        if self.aggregate != "sum":
            return (
                f"aggregate {self.aggregate!r} needs two gradients, and it makes one of both losses"
            )
        return None

    @property
    def takes_left_weights(self) -> bool:
        """Whether a receiver can use what a donor has left that is over."""
        if self.exchange == "auto":
            return self.no_stand_in is None and not self.require_peer
        return self.has_own_weights

    @property
    def has_stale_gradients(self) -> bool:
        """Whether gradients may come that were taken at older weights of the receiver."""
        return self.exchange in ("auto", "gradient") and self.max_staleness > 0

    @property
    def writes_behind(self) -> bool:
        """Whether no step waits for what the other job brings, nor need it for the disk."""
        return self.replay is None and (self.has_stale_gradients or not self.follows)

    def _check_delta(self) -> None:
        if self.aggregate != "sum":
            raise ValueError(
                f"aggregate {self.aggregate!r} weighs gradients, and exchange 'delta' has none of "
                "the donor's: use aggregate 'sum', or exchange 'gradient'"
            )
        if self.local_steps < 1:
            raise ValueError(f"local_steps must be at least 1, got {self.local_steps}")
        if self.max_staleness % self.local_steps:
            raise ValueError(
                f"max_staleness {self.max_staleness} must be a multiple of local_steps "
                f"({self.local_steps}): differences are applied after so many steps"
            )
        if not self.outer_learning_rate > 0:
            raise ValueError(
                f"outer_learning_rate must be positive, got {self.outer_learning_rate}"
            )
        if not 0 <= self.outer_momentum < 1:
            raise ValueError(
                f"outer_momentum must be at least 0 and below 1, got {self.outer_momentum}"
            )
        interval = self.checkpoint_interval
        if interval is not None and interval % self.local_steps:
            raise ValueError(
                f"checkpoint_interval {interval} must be a multiple of local_steps "
                f"({self.local_steps}): a checkpoint between two exchanges loses the donor's steps"
            )

    def _check_distill(self) -> None:
        reasons = {
            "scope": "a teacher's loss moves the backbone too",
            "rescale": "the teacher looks at the receiver's own samples, whose number is one",
            "aggregate": "both losses go through one backward, which gives one gradient",
            "max_staleness": "no step waits for a donor",
            "keep_payloads": "a teacher is replaced when it is read, and no record says when",
            "replay": "a teacher is replaced when it is read, and no record says when",
        }
        for name, reason in reasons.items():
            self._check_default(name, f"{reason}. Or use exchange 'gradient'")

    def _check_default(self, name: str, reason: str, of: str = "exchange") -> None:
        """Refuse a setting that this exchange would not look at, unless nobody has set it.

        Or this value of another setting than ``exchange``.
        """
        value, default = getattr(self, name), type(self).__dataclass_fields__[name].default
        if value != default:
            raise ValueError(
                f"{name} {value!r} has no meaning for {of} {getattr(self, of)!r}, leave it at "
                f"{default!r}: {reason}"
            )

    def _check_teachers(self) -> None:
        if self.distill_loss not in DISTILL_LOSSES:
            raise ValueError(
                f"distill_loss {self.distill_loss!r} is unknown; choose one of "
                f"{list(DISTILL_LOSSES)}"
            )
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be positive and finite, got {self.temperature}")

    @property
    def payload_age(self) -> int:
        """Receiver steps between the weights of a payload and its place, at most."""
        return self.max_staleness + (self.local_steps if self.exchange == "delta" else 0)

    def job_of(self, role: Role) -> str:
        """The name in a run of the job that has this role."""
        return self.donor_name if role == "donor" else role

    def weights_of(self, heads: Collection[str]) -> dict[str, float]:
        """Lambda of each of ``heads``, which are all that donors train.

        Raises:
            ValueError: if ``donor_weight`` names heads, and not exactly these.
        """
        weights = self.donor_weight
        if not isinstance(weights, Mapping):
            return dict.fromkeys(heads, weights)
        if unknown := sorted(weights.keys() - set(heads)):
            raise ValueError(f"donor_weight names {unknown}, but donors train {sorted(heads)}")
        if missing := sorted(set(heads) - weights.keys()):
            raise ValueError(f"donor_weight has no {missing}, only {sorted(weights)}")
        return {head: weights[head] for head in heads}

    def _check_replay(self, replay: Path) -> None:
        for name in ("resume_from_checkpoint", "keep_payloads", "require_peer"):
            if getattr(self, name):
                raise ValueError(
                    f"replay {str(replay)!r} and {name} exclude each other: a replay begins at "
                    "step 0, without a donor, and its payloads are kept already"
                )
        if replay.absolute().parent == Path(self.runs_dir).absolute():
            raise ValueError(
                f"runs_dir {str(self.runs_dir)!r} holds the run to replay, and a donor may wait "
                "there: give the replay a runs_dir of its own"
            )
