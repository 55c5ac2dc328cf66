"""The receiver's side: weights out, the donors' gradients in.

In a training loop, :meth:`GradientReceiver.backward` takes the place of ``accelerator.backward``,
:meth:`~GradientReceiver.inject` stands before clipping, :meth:`~GradientReceiver.commit` after
``optimizer.step()``. All three may be called at every micro-step: the last two do nothing until
the gradients are synchronised.

In plain PyTorch, started by ``python`` or ``torchrun``, the accelerator is a handle and no more:

.. code-block:: python

    import torch
    from accelerate import Accelerator
    from my_project import build_model, cross_entropy, h1_dataloader
    from toolkit import GradientReceiver

    model = build_model()  # bare or in DistributedDataParallel; heads.h2 requires no gradient
    optimizer = torch.optim.AdamW(model.parameters())
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    with GradientReceiver(accelerator, model, optimizer) as receiver:
        for inputs, labels in h1_dataloader():
            loss = cross_entropy(model(inputs, "h1"), labels)
            receiver.backward(loss, num_samples=len(labels))  # in place of loss.backward()
            receiver.inject()  # before clipping
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            receiver.commit()  # after the step

To accumulate, take ``Accelerator(gradient_accumulation_steps=...)``, put the inner part below
``with accelerator.accumulate(model)`` and clip, step and zero only ``if
accelerator.sync_gradients``. A loss scaler must be the accelerator's: ``mixed_precision="fp16"``.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from toolkit.bridge.blueprints import check_sharded_head, draw_blueprints, sharded_head
from toolkit.bridge.collector import Collector, Findings
from toolkit.bridge.config import BridgeConfig, Role
from toolkit.bridge.digests import digest_tensors
from toolkit.bridge.donors import Donors, open_donors
from toolkit.bridge.errors import BridgeError
from toolkit.bridge.frozen_state import FrozenOptimizerState, frozen_sharded
from toolkit.bridge.injection import Injector
from toolkit.bridge.job import BridgeJob
from toolkit.bridge.ledger import Ledger, Resumption, trail_path
from toolkit.bridge.lessons import Lessons, LossFunction
from toolkit.bridge.liveness import BEAT_SECONDS, SILENT_BEATS, PeerWatch, Wait
from toolkit.bridge.outage import ride_out
from toolkit.bridge.outer import OuterOptimizer
from toolkit.bridge.payload import Header, Record, decompressed
from toolkit.bridge.replay import KeptPayloads, Replay
from toolkit.bridge.retention import CheckpointCursors
from toolkit.bridge.teacher import Blueprint, TeacherFactory
from toolkit.bridge.teachers import Teachers
from toolkit.bridge.weights_outbox import WeightsOutbox
from toolkit.configuration import check_one_scaled_optimizer
from toolkit.parameters import (
    check_head_rests,
    check_takes_late_gradients,
    innermost_optimizer,
)

logger = logging.getLogger(__name__)


class GradientReceiver(BridgeJob):
    """Joins a training loop to the gradients of one donor or several.

    Args:
        accelerator: the job's accelerator.
        model: the prepared model, whole or sharded by FSDP2. The donors' heads must not be managed
            by DDP: call ``requires_grad_(False)`` on them before ``prepare``, and give all
            parameters to the optimizer. A parameter of the backbone that does not require a
            gradient rests, as the base of LoRA adapters does: it does not cross, and must be equal
            in all jobs; one that is frozen later crosses, but no donor moves it.
        optimizer: its optimizer, with the shared parameters in its groups.
        config: the settings; by default lockstep in ``runs``.
        backbone: name of the backbone's submodule.
        head: name of the submodule of the donors' head, or several names.
        teacher_loss_fn: of the student's and a teacher's logits, reduced as
            ``config.loss_reduction``, in place of ``config.distill_loss``.
        teacher_factory: makes a teacher where ``head(backbone(*inputs))`` of copied modules is
            none: the model does more than that, its modules cannot be copied (FSDP2) or, in
            exchange ``distill``, the donor's backbone is another. A module that maps the inputs
            given to :meth:`teacher_loss` to logits, and whose ``state_dict`` has the donor's names.

    Attributes:
        completed_steps: optimizer steps that happened.
        steps_alone: those of them without a gradient, or a teacher, of any donor.
        steps_taught: those in which some head had a teacher.
        completed_windows: accumulation windows, those included whose step a loss scaler skipped.
        metrics: numbers of the newest step, plain floats, for ``accelerator.log``.
        stop_signal: of a signal that came, its number; else 0. See :meth:`interruptible`.
        output_dir: where this job's results belong.

    Raises:
        ValueError: for an unknown module, shared parameters that the optimizer lacks, several
            optimizers under one loss scaler, a ``teacher_factory`` that does not fit, or fused SGD
            with momentum, which fails in torch after a step without a payload.
        BridgeError: for a run that cannot be joined, or a job that is launched in a way that is not
            supported.
    """

    role: ClassVar[Role] = "receiver"

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: BridgeConfig | None = None,
        *,
        backbone: str = "backbone",
        head: str | Sequence[str] = "heads.h2",
        teacher_loss_fn: LossFunction | None = None,
        teacher_factory: TeacherFactory | None = None,
    ) -> None:
        config = config or BridgeConfig()
        if not config.has_teachers and (teacher_loss_fn or teacher_factory):
            raise ValueError(
                f"exchange {config.exchange!r} has no teacher: leave teacher_loss_fn and "
                "teacher_factory out, or use exchange 'distill' or 'auto'"
            )
        self._lessons: Lessons | None = None
        self._backbone_name, self._teacher_factory = backbone, teacher_factory
        super().__init__(accelerator, model, optimizer, config, backbone=backbone, head=head)
        if self._blueprints:
            self._lessons = self._begin_lessons(self._blueprints, teacher_loss_fn)

    def _attach(self) -> None:
        if self.config.exchange == "distill":
            check_sharded_head(self.shared)
        is_sharded = sharded_head(self.shared) is not None
        check_head_rests(self.shared.head, may_train=self.config.has_teachers and is_sharded)
        check_takes_late_gradients(self.optimizer)
        check_one_scaled_optimizer(self.accelerator)
        self._blueprints = draw_blueprints(
            self.accelerator,
            self.model,
            self.shared,
            self.config,
            backbone=self._backbone_name,
            factory=self._teacher_factory,
        )
        replay = self.config.replay
        self._kept = KeptPayloads(Path(replay), self._signer) if replay is not None else None
        self._injector = Injector(
            self.accelerator, self.parameters.values(), self.shared, self.control, self.config
        )
        super()._attach()
        self.completed_steps = 0
        self.completed_windows = 0
        self.steps_alone = 0
        self.steps_taught = 0
        self._has_published = False
        self._injected: _Injection | None = None
        self._in_exchange = False  # in "delta": the local steps are over, the outer one is not
        self._outbox: WeightsOutbox | None = None  # on the main process
        self._collector = self._open_collector()
        # Weights that change before they are published, or are asked for again: a copy of them.
        is_late = self.config.writes_behind or self.config.exchange == "delta"
        self._copies: dict[str, Tensor] | None = {} if is_late else None
        self._retention = CheckpointCursors(
            self.transport, self.run_id, will_save=self.config.checkpoint_interval is not None
        )
        self._outer = self._open_outer() if self.config.exchange == "delta" else None
        if frozen := frozen_sharded(self.shared.head):
            inner = innermost_optimizer(self.optimizer)
            self.accelerator.register_for_checkpointing(FrozenOptimizerState(inner, frozen))

    def _open_collector(self) -> Collector:
        """Of the donors, and on the main process the way of the weights to them."""
        donors: Donors | Replay | None = None
        ledger_path: Path | None = None
        if self.accelerator.is_main_process:
            ledger_path = trail_path(self.run_dir, self.attempt)
            donors = self._open_donors()
            self._outbox = WeightsOutbox(self._publisher, donors, publishes=self.config.follows)
            if isinstance(donors, Donors) and self.config.writes_behind:
                self._reading.read_ahead(donors.next_records)
        return Collector(
            donors,
            self._outbox,
            Ledger(ledger_path, durable=self.config.keep_payloads),
            transport=self.transport,
            waiting=self._waiting,
            reading=self._reading,
            config=self.config,
        )

    def _open_donors(self) -> Donors | Replay:
        if self._kept is not None:
            return Replay(self._kept, self._reading.read)
        return open_donors(
            self.transport,
            self.config,
            backbone=self.shared.backbone,
            expected={head: self._gradient_parameters(head) for head in self.shared.heads},
            read=self._reading.read,
            open_wait=self._open_donor_wait,
        )

    def _open_donor_wait(self, peer: PeerWatch, what: str) -> Wait:
        patience, may_teach = None, self._lessons is not None and not self.config.require_peer
        if may_teach and peer.seen:  # a teacher takes over: do not stall
            patience = min(self.config.peer_wait, SILENT_BEATS * BEAT_SECONDS)
        return self._waiting.begin(peer, what, patience)

    def _read_now(self, job: str, sequence: int) -> Record:
        read = super()._read_now if self._kept is None else self._kept.read
        return decompressed(read(job, sequence), self._payloads_like)

    def _open_outer(self) -> OuterOptimizer:
        config = self.config
        outer = OuterOptimizer(
            self.shared,
            config.weights_of(self.shared.heads),
            config.outer_learning_rate,
            config.outer_momentum,
        )
        if config.outer_momentum:
            self.accelerator.register_for_checkpointing(outer.optimizer)
        return outer

    # -- the three calls --------------------------------------------------------------------

    def backward(self, loss: Tensor, num_samples: float | Tensor) -> None:
        """Back-propagate one micro-batch, in place of ``accelerator.backward(loss)``.

        Args:
            loss: scalar, reduced over ``num_samples`` as ``config.loss_reduction`` says.
            num_samples: this rank's samples in the micro-batch.
        """
        if self._injected is not None:
            raise RuntimeError("backward() after inject(): call commit() after optimizer.step()")
        if not self._has_published and self.config.exchange != "distill":
            if self.config.init_h2 == "donor" and self.completed_steps == 0:
                self._collector.take_heads(self.shared)
            self._publish_weights()
        self.accumulator.backward(loss, num_samples)
        if self._lessons is not None:
            self._lessons.count(float(num_samples))

    def inject(self) -> None:
        """At the synchronised micro-step: make ``.grad`` the gradient of the joint step.

        Waits for the donor's gradient (lockstep), rescales both sums, and adds; on the backbone
        with the weights that ``config.aggregate`` finds, where that is not ``sum``. Without a
        gradient of the donor the receiver's own is left as it is. Call it after :meth:`backward`
        and before clipping. A collective.

        Raises:
            RuntimeError: if called twice in a window, or without a backward.
            PeerError: if the donor does not come and ``require_peer`` is set.
        """
        if not self.accelerator.sync_gradients:
            return
        if self._injected is not None:
            raise RuntimeError("inject() was called twice in this accumulation window")
        self._resting.check()
        window = self.accumulator.close(self._lessons.sums() if self._lessons else ())
        self.accumulator.reduce_unmanaged_(self.parameters.items())
        takes_gradients = self._outer is None and self.config.exchange != "distill"
        found, records = self._collect() if takes_gradients else (Findings(), [])
        for head, parameters in self.shared.heads.items():
            for parameter in () if head in self.taught_heads else parameters.values():
                parameter.grad = None  # zeros would let the optimizer's moments move the head
        self.metrics = {
            "loss/own (per sample)": window.loss,
            **self._injector.inject(window, records, self.completed_steps),
        }
        if self._lessons is not None:
            self.metrics |= self._lessons.metrics(window)
        self._injected = _Injection(window.scale, found)

    def commit(self) -> bool:
        """After ``optimizer.step()``: settle whether the step happened, publish the new weights.

        Whatever else changes the weights in a step (clipping them, say) comes before it.

        Returns:
            Whether an optimizer step happened. False between synchronised micro-steps, and after
            a step that a loss scaler skipped: the payload then stays pending for the next try.

        Raises:
            RuntimeError: if the gradients were synchronised and :meth:`inject` was not called.
        """
        if not self.accelerator.sync_gradients:
            return False
        if self._injected is None:
            raise RuntimeError(
                "commit() without inject() at a synchronised step: call inject() after backward() "
                "and before clipping"
            )
        injected, self._injected = self._injected, None
        self.completed_windows += 1
        self._vote_to_stop()
        stepped = self._end_step(injected)
        self.metrics |= self._waiting.metrics()
        return stepped

    def _end_step(self, injected: _Injection) -> bool:
        """Settle a step and publish the new weights; whether it happened. A collective."""
        was_skipped = self._step_was_skipped(injected.scale)
        lessons = self._lessons
        is_taught = lessons is not None and bool(self.taught_heads) and lessons.were_asked
        if lessons is not None and not self.config.follows:
            self.completed_steps += not was_skipped
            self.steps_alone += not was_skipped and not is_taught
            self.steps_taught += not was_skipped and is_taught
            lessons.end_window(was_skipped)
            return not was_skipped
        if was_skipped:
            return False
        if self._outer is None:
            self._settle(injected.found, num_steps=0 if is_taught else 1)
            self.steps_taught += is_taught
            self.completed_steps += 1
            self._publish_weights()
            if lessons is not None:
                self._change_lessons(lessons, injected.found)
            return True
        self.completed_steps += 1
        if self.completed_steps % self.config.local_steps == 0:
            self._in_exchange = True
            found, records = self._collect()
            if records:
                self.metrics |= self._outer.step(records)
            self._settle(found, num_steps=self.config.local_steps)
            self._publish_weights()
            self._in_exchange = False
        return True

    # -- teachers -----------------------------------------------------------------------------

    @property
    def taught_heads(self) -> tuple[str, ...]:
        """Names of the heads with a teacher at work, for :meth:`teacher_loss`; in order.

        Changes in :meth:`commit` only, and alike on all ranks.
        """
        return self._lessons.taught_heads if self._lessons is not None else ()

    def teacher_loss(self, logits: Tensor, *inputs: Any, head: str | None = None) -> Tensor:
        """The part of a taught head in the loss of a micro-batch: lambda times the distillation
        loss, to be added to the own loss that :meth:`backward` gets.

        Args:
            logits: (..., K), the receiver's own of this head.
            inputs: what the backbone was given for them.
            head: one of ``taught_heads``; may be left out where the receiver has one head.

        Returns:
            A scalar, reduced over samples as ``config.loss_reduction`` says.

        Raises:
            ValueError: for a head left out where there are several.
            RuntimeError: for a head without a teacher at work.
        """
        if self._lessons is None:
            raise RuntimeError(
                f"exchange {self.config.exchange!r} has no teachers here: ask for the losses of "
                "taught_heads only"
            )
        return self._lessons.loss(head, logits, inputs)

    def _begin_lessons(
        self, blueprints: Mapping[str, Blueprint], loss_fn: LossFunction | None
    ) -> Lessons:
        teachers = Teachers(self.transport, self.control, run_id=self.run_id, blueprints=blueprints)
        lessons = Lessons(teachers, self.shared, self.config, loss_fn)
        if self.config.exchange == "auto":
            teachers.at_work = frozenset()
            return lessons
        watch = self._collector.first_watch()
        lessons.begin(self._waiting.begin(watch, "a teacher"), watch.job, self._waiting.rest)
        return lessons

    def _change_lessons(self, lessons: Lessons, found: Findings) -> None:
        """Exchange ``auto``: teachers stand in for donors that are away.

        A collective where some are.
        """
        try:
            if self.taught_heads and not lessons.were_asked:
                raise BridgeError("the training loop does not add receiver.teacher_loss()")
            lessons.stand_in(found.heads_alone, found.heads_trained, self.completed_steps)
            lessons.end_window(was_skipped=False)
        except BridgeError as error:
            if self.accelerator.is_main_process:
                logger.warning("no teacher stands in for donors that are away: %s", error)
            lessons.end()
            self._lessons = None

    # -- inside -----------------------------------------------------------------------------

    def _collect(self) -> tuple[Findings, list[Record]]:
        """The donors' parts of this step. A collective."""
        return self._collector.collect(
            self.completed_steps, self.taught_heads, may_teach=self._lessons is not None
        )

    def _settle(self, found: Findings, num_steps: int) -> None:
        """What was found has been applied in as many steps."""
        self.metrics |= self._collector.settle(found)
        self.steps_alone += 0 if found.applied else num_steps

    def _step_was_skipped(self, scale_before: float) -> bool:
        """Whether the loss scaler skipped the step; a fused optimizer's own flag is unreliable."""
        scaler = self.accelerator.scaler
        fell = scaler is not None and float(scaler.get_scale()) < scale_before
        return fell or bool(getattr(self.optimizer, "step_was_skipped", False))

    def _publish_weights(self) -> None:
        """Take the present weights and publish them. A collective."""
        self._has_published = True
        self._waiting.catch_up()
        if self._outbox is not None:
            self._outbox.forget()  # the last ones, before these take as much memory
        weights = self._whole_weights(self.shared.crossing, self._copies)
        if self._outbox is not None:
            self._outbox.take(self._header("weights", ""), weights)
        self._waiting.persist(self._write_step)
        if self._outbox is not None and self.config.writes_behind:
            publish, is_due = self._outbox.publish, self._outbox.is_due()
            self._waiting.write_behind(lambda: publish(is_due))

    def _write_step(self) -> None:
        """On the main process: what the disk must have of a step; may be repeated."""
        assert self._outbox is not None
        self._collector.write()
        if not self.config.writes_behind:
            self._outbox.offer()
        self._retention.acknowledge(self._collector.on_main.cursors())

    def _header(self, kind: Any, digest: str) -> Header:
        return Header(
            kind=kind,
            run_id=self.run_id,
            job=self.job,
            attempt=self.attempt,
            receiver_step=self.completed_steps,
            weights_digest=digest,
        )

    def _end_header(self) -> Header:
        return self._header("end", "")

    def close(self) -> None:
        """Publish this job's end and leave together. A collective; safe to call twice.

        In exchange ``delta`` the steps since the last exchange count as alone.
        """
        if not self._closed and self._outer is not None:
            steps = self.completed_steps % self.config.local_steps
            if steps:
                logger.warning(
                    "steps taken alone, after the last exchange: %d (there is one after every %d "
                    "steps, local_steps)", steps, self.config.local_steps,
                )  # fmt: skip
            self.steps_alone += steps
        super().close()

    def _stop(self) -> None:
        if self._lessons is not None:
            self._lessons.teachers.close()
        super()._stop()

    # -- checkpoints and results --------------------------------------------------------------

    @property
    def obstacle_to_saving(self) -> str | None:
        """Why ``save_state()`` is refused just now; None where it is not."""
        if self._injected is not None:
            return "save_state() between inject() and commit(): save after commit()"
        between = self._in_exchange or self.completed_steps % self.config.local_steps
        if self._outer is not None and between:
            return (
                f"save_state() at step {self.completed_steps} would lose the donors' local steps: "
                f"save at multiples of local_steps ({self.config.local_steps})"
            )
        return super().obstacle_to_saving

    def _state(self) -> dict[str, Any]:
        return {
            "attempt": self.attempt,
            "initial_digest": self._outbox.initial_digest if self._outbox else "",
            "completed_steps": self.completed_steps,
            "completed_windows": self.completed_windows,
            "steps_alone": self.steps_alone,
            "steps_taught": self.steps_taught,
            "teachers": self._lessons.teachers.state() if self._lessons is not None else {},
            **self._collector.state(),
        }

    def _load_state(self, state: dict[str, Any]) -> None:
        if self._outbox is not None:
            self._outbox.initial_digest = state["initial_digest"]
        self.completed_steps = state["completed_steps"]
        self.completed_windows = state["completed_windows"]
        self.steps_alone = state["steps_alone"]
        self.steps_taught = state["steps_taught"]
        ledger = self._collector.ledger
        ledger.resume(Resumption(state["attempt"], self.completed_steps), state["ledger"])
        self._waiting.persist(ledger.flush)
        self._injector.forget_weights()
        if self._injector.needs_older_weights:
            # Older weights are in no checkpoint: what was taken at them is superseded.
            digests = state["digests"].items()
            present = {step: d for step, d in digests if int(step) == self.completed_steps}
            state = {**state, "digests": present}
        if self._collector.donors is not None:
            self._collector.donors.load_state(state)

    def _on_load_state(self, models: list[nn.Module], directory: str) -> None:
        super()._on_load_state(models, directory)
        # What this checkpoint and those beside it may ask for is kept from the first step on.
        self._retention.saved_below(Path(directory).absolute().parent)

    def _on_save_state(self, models: list[nn.Module], weights: list[Any], directory: str) -> None:
        super()._on_save_state(models, weights, directory)
        if self.accelerator.is_main_process:
            self._retention.saved_below(Path(directory).absolute().parent)

    @property
    def mean_staleness(self) -> float | None:
        """How old the weights of a payload were when it was applied, in receiver steps, on average.

        Over this start; None without payloads, and where they are not taken at the receiver's
        weights.
        """
        return self._collector.mean_staleness

    def fates(self) -> dict[str, int]:
        """How many payloads met which fate, over all donors, for ``results.json``.

        ``applied + dropped + rejected + skipped + pending = published``; ``alien`` counts files in
        the donors' directories that are no payloads. All zero but on the main process.
        """
        names = ["applied", "dropped", "rejected", "skipped", "pending", "published", "alien"]
        total = dict.fromkeys(names, 0)
        for fates in self.fates_by_donor().values():
            for name, count in fates.items():
                total[name] += count
        return total

    def fates_by_donor(self) -> dict[str, dict[str, int]]:
        """The same for each donor; empty but on the main process.

        Raises:
            DiskError: if the donors' directories cannot be looked at for ``peer_wait`` seconds.
        """
        return ride_out(self._collector.fates, self.run_dir, self.config.peer_wait)

    def alarms(self) -> dict[str, dict[str, int]]:
        """By donor, how many payloads have raised which alarm, for ``results.json``.

        Empty but on the main process. The alarms: ``zero``, ``idle head`` and ``idle backbone``
        (exactly zero gradients, three in a row), ``norm`` (30 times the usual), ``flat loss``.
        """
        donors = self._collector.donors
        return donors.alarms() if donors is not None else {}

    def evidence(self, model_state: Mapping[str, Tensor]) -> dict[str, Any]:
        """What ``gradient-bridge verify`` must know beside the arguments, for ``results.json``.

        Args:
            model_state: the final weights by plain parameter name.

        Returns:
            ``run_id``; ``attempt``, which start of the receiver this is; the digest of the shared
            weights at step 0 and of all weights at the end; in a replay ``departed_at``, as
            :class:`Replay` has it.
        """
        evidence: dict[str, Any] = {
            "run_id": self.run_id,
            "attempt": self.attempt,
            "initial_weights_digest": self._outbox.initial_digest if self._outbox else "",
            "final_weights_digest": digest_tensors(model_state),
        }
        if isinstance(self._collector.donors, Replay):
            evidence["departed_at"] = self._collector.donors.departed_at
        return evidence


@dataclasses.dataclass(frozen=True, slots=True)
class _Injection:
    """An injected step that is not committed yet."""

    scale: float
    found: Findings
