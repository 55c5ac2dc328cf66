"""The receiver's side: weights out, the donor's gradient in.

In a training loop, :meth:`GradientReceiver.backward` takes the place of ``accelerator.backward``,
:meth:`~GradientReceiver.inject` stands before clipping, :meth:`~GradientReceiver.commit` after
``optimizer.step()``. All three may be called at every micro-step: the last two do nothing until
the gradients are synchronised.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from toolkit.aggregation import find_rule, guarded_weights
from toolkit.bridge.accumulation import scale_grads_
from toolkit.bridge.config import Role
from toolkit.bridge.errors import PayloadError, PeerError
from toolkit.bridge.frozen_state import FrozenOptimizerState, frozen_sharded
from toolkit.bridge.inbox import Inbox, Verdict
from toolkit.bridge.job import BridgeJob
from toolkit.bridge.ledger import Ledger, Resumption, trail_path
from toolkit.bridge.measures import aggregation_metrics, injection_metrics, inner_products
from toolkit.bridge.payload import Header, Record, digest_tensors
from toolkit.bridge.replay import KeptPayloads, Replay
from toolkit.bridge.rescaling import rescale_factors
from toolkit.bridge.retention import CheckpointCursors
from toolkit.configuration import check_one_scaled_optimizer
from toolkit.parameters import (
    check_head_rests,
    check_takes_late_gradients,
    innermost_optimizer,
)
from toolkit.sharding import full_tensor, shard_like

logger = logging.getLogger(__name__)

WEIGHTS_KEPT = 2  # the newest weights, and the ones that a donor may be reading


class GradientReceiver(BridgeJob):
    """Joins a training loop to a donor's gradients.

    Args:
        accelerator: the job's accelerator.
        model: the prepared model, whole or sharded by FSDP2. The donor's head must not be managed
            by DDP: call ``requires_grad_(False)`` on it before ``prepare``, and give all parameters
            to the optimizer. A parameter of the backbone that does not require a gradient rests:
            the donor's does not move it either.
        optimizer: its optimizer, with the shared parameters in its groups.
        config: the settings; by default lockstep in ``runs``.
        backbone: name of the backbone's submodule.
        head: name of the submodule of the donor's head.

    Attributes:
        completed_steps: optimizer steps that happened.
        steps_alone: those of them without a gradient of the donor.
        completed_windows: accumulation windows, those included whose step a loss scaler skipped.
        metrics: numbers of the newest step, plain floats, for ``accelerator.log``.
        output_dir: where this job's results belong.

    Raises:
        ValueError: for an unknown module, shared parameters that the optimizer lacks, several
            optimizers under one loss scaler, or fused SGD with momentum, which fails in torch after
            a step without a payload.
        BridgeError: for a run that cannot be joined, or a job that is launched in a way that is not
            supported.
    """

    role: ClassVar[Role] = "receiver"

    def _attach(self) -> None:
        check_head_rests(self.shared.head)
        check_takes_late_gradients(self.optimizer)
        check_one_scaled_optimizer(self.accelerator)
        replay = self.config.replay
        self._kept = KeptPayloads(Path(replay)) if replay is not None else None
        super()._attach()
        self.completed_steps = 0
        self.completed_windows = 0
        self.steps_alone = 0
        self._has_published = False
        self._weights: dict[str, Tensor] = {}  # main process: the present ones, whole, on the CPU
        self._step_on_disk = -1  # of the newest weights that a donor can read
        self._injected: _Injection | None = None
        # What the donor has been told that it may delete, exclusive.
        self._acknowledged = self.transport.acknowledged("donor")
        self.ledger = Ledger(
            trail_path(self.run_dir, self.attempt) if self.accelerator.is_main_process else None,
            durable=self.config.keep_payloads,
        )
        self._inbox: Inbox | Replay
        if self._kept is not None:
            self._inbox = Replay(self._kept.path, self._read)
        else:
            self._inbox = Inbox(
                transport=self.transport,
                read=self._read,
                expected=dict(self.gradient_parameters),
                unit=self.config.unit,
                max_staleness=self.config.max_staleness,
            )
        self._initial_digest = ""
        self._retention = CheckpointCursors(self.run_id)
        if frozen := frozen_sharded(self.shared.head):
            inner = innermost_optimizer(self.optimizer)
            self.accelerator.register_for_checkpointing(FrozenOptimizerState(inner, frozen))
        aggregate = self.config.aggregate
        self._rule = None if aggregate == "sum" else find_rule(aggregate)

    # -- the three calls --------------------------------------------------------------------

    def backward(self, loss: Tensor, num_samples: float | Tensor) -> None:
        """Back-propagate one micro-batch, in place of ``accelerator.backward(loss)``.

        Args:
            loss: scalar, reduced over ``num_samples`` as ``config.loss_reduction`` says.
            num_samples: this rank's samples in the micro-batch.
        """
        if self._injected is not None:
            raise RuntimeError("backward() after inject(): call commit() after optimizer.step()")
        if not self._has_published:
            self._publish_weights()
        self.accumulator.backward(loss, num_samples)

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
        window = self.accumulator.close()
        self.accumulator.reduce_unmanaged_(self.parameters.items())
        verdict, record, wait_seconds = self._receive()
        num_donor = record.header.count if record is not None else 0.0
        own_factor, donor_factor = rescale_factors(
            self.config.rescale,
            self.config.loss_reduction,
            window.count,
            num_donor,
            self.config.donor_weight,
        )
        for parameter in self.shared.head.values():
            parameter.grad = None  # zeros would let the optimizer's moments move the head
        scale_grads_(self.parameters.values(), window.sum_factor * own_factor)
        self._injected = _Injection(window.scale, verdict)
        self.metrics = {
            "loss/own (per sample)": window.loss,
            "bridge/wait (s)": wait_seconds,
            "bridge/samples own (samples)": window.count,
        }
        if record is not None:
            tensors = {
                name: shard_like(record.tensors[name].to(p.device, p.dtype), p)
                for name, p in self.gradient_parameters.items()
                if name in self.shared.trained
            }
            backbone, heads = inner_products(
                self.parameters.values(), self.shared.backbone, tensors, self.control,
                1 / window.scale, donor_factor,
            )  # fmt: skip
            self.metrics |= injection_metrics(backbone, heads, window, record, donor_factor)
            own_weight, donor_weight = self._weigh(backbone)
            if own_weight != 1.0:
                scale_grads_(self.shared.backbone.values(), own_weight)
            self._add_(tensors, donor_factor * window.scale, donor_weight)
            self.metrics["bridge/staleness (receiver steps)"] = float(verdict.staleness)

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
        if self._step_was_skipped(injected.scale):
            return False
        if self.accelerator.is_main_process:
            if self.config.keep_payloads and injected.verdict.digest is not None:
                self.transport.keep("donor", injected.verdict.sequence)
            self.ledger.record(self._inbox.settle(injected.verdict))
        self.completed_steps += 1
        self.steps_alone += injected.verdict.digest is None
        self._publish_weights()
        return True

    # -- inside -----------------------------------------------------------------------------

    def _read(self, sequence: int) -> Record:
        return super()._read(sequence) if self._kept is None else self._kept.read(sequence)

    def _receive(self) -> tuple[Verdict, Record | None, float]:
        """The donor's part of this step, the same on every rank."""
        waited = 0.0
        while True:
            verdict, seconds = self._decide(
                f"the donor's gradient at receiver step {self.completed_steps}",
                self._poll,
                self._give_up,
            )
            waited += seconds
            if verdict.digest is None:
                return verdict, None, waited
            mine = self._inbox.fetched if self.accelerator.is_main_process else None
            record = self._read_everywhere(verdict.sequence, verdict.digest, mine)
            if record is not None:
                return verdict, record, waited
            if self.accelerator.is_main_process:
                detail = "not every rank could read the same bytes"
                self._inbox.reject(verdict.sequence, PayloadError("unreadable", detail))

    def _poll(self) -> Verdict | None:
        """On the main process: one look at the donor's stream."""
        if self.transport.rejection("receiver", self._next_sequence - 1) is not None:
            logger.warning("the donor could not read the weights; publishing them again")
            self._offer_weights()
        verdict = self._inbox.look(self.completed_steps, self.peer)
        if self._inbox.donor_is_away and self.config.require_peer:
            raise PeerError("the donor has ended, and --require_peer is set")
        if verdict is None and self._step_on_disk != self.completed_steps:
            # The donor is back after a silence in which nothing was published for it.
            self._offer_weights()
        return verdict

    def _give_up(self, reason: str) -> Verdict | None:
        verdict = self._inbox.give_up(self.completed_steps, self.peer)
        if verdict is None:
            return None
        logger.warning(
            "TRAINING ALONE: %s. From receiver step %d on the donor's head and its part of the "
            "backbone's gradient are missing, until it comes back",
            reason, self.completed_steps,
        )  # fmt: skip
        return verdict

    def _weigh(self, backbone: Tensor) -> tuple[float, float]:
        """Weights of both parts on the backbone, from their Gramian. A collective but for sums.

        The parts are what a sum would add: rescaled, the donor's times ``donor_weight``. The
        heads, of which each has one part only, keep it as it is, as is usual for parameters of
        one task. The main process decides, so that ranks cannot differ by rounding.
        """
        if self._rule is None:
            return 1.0, 1.0
        rule = self._rule
        own, donor = self.control.on_main(lambda: guarded_weights(rule, backbone).tolist())
        self.metrics |= aggregation_metrics(backbone, (own, donor))
        return own, donor

    def _add_(self, tensors: Mapping[str, Tensor], factor: float, backbone_weight: float) -> None:
        """Add ``factor`` times the donor's sum to ``.grad``; identical on every rank.

        Args:
            tensors: the sum, by name, like the parameters in device and dtype.
            factor: of all of it.
            backbone_weight: a further factor of the backbone's.
        """
        for name, tensor in tensors.items():
            parameter = self.gradient_parameters[name]
            weight = factor * backbone_weight if name in self.shared.backbone else factor
            if parameter.grad is None:
                # a copy: after a skipped step the sum is used again
                parameter.grad = tensor * weight
            else:
                parameter.grad.add_(tensor, alpha=weight)

    def _step_was_skipped(self, scale_before: float) -> bool:
        """Whether the loss scaler skipped the step; a fused optimizer's own flag is unreliable."""
        scaler = self.accelerator.scaler
        fell = scaler is not None and float(scaler.get_scale()) < scale_before
        return fell or bool(getattr(self.optimizer, "step_was_skipped", False))

    def _publish_weights(self) -> None:
        """Take the present weights and publish them. A collective where they are sharded."""
        self._has_published = True
        self._weights = {}  # free the last ones first
        for name, tensor in self.shared.weights.items():
            whole = full_tensor(tensor.detach())
            if self.accelerator.is_main_process:
                self._weights[name] = whole.cpu().contiguous()
        if self.accelerator.is_main_process:
            self._offer_weights()

    def _offer_weights(self) -> None:
        """Publish the newest weights taken, unless nobody is there (main process)."""
        tensors = self._weights
        digest = digest_tensors(tensors)
        if self.completed_steps == 0:
            self._initial_digest = digest
        self._inbox.remember(self.completed_steps, digest)
        self.peer.observe()
        if not self._inbox.donor_is_away or self.peer.is_alive(self.config.peer_wait):
            self._publish(self._header("weights", digest), tensors)
            self.transport.prune("receiver", self._next_sequence - WEIGHTS_KEPT)
            self._step_on_disk = self.completed_steps
        needed = self._retention.oldest_needed(self._inbox.cursor)
        if needed > self._acknowledged:
            self.transport.acknowledge("donor", needed)
            self._acknowledged = needed

    def _header(self, kind: Any, digest: str) -> Header:
        return Header(
            kind=kind,
            run_id=self.run_id,
            job=self.role,
            attempt=self.attempt,
            receiver_step=self.completed_steps,
            weights_digest=digest,
        )

    def _end_header(self) -> Header:
        return self._header("end", "")

    # -- checkpoints and results --------------------------------------------------------------

    def _check_at_boundary(self) -> None:
        if self._injected is not None:
            raise RuntimeError("save_state() between inject() and commit(): save after commit()")
        super()._check_at_boundary()

    def _state(self) -> dict[str, Any]:
        return {
            "attempt": self.attempt,
            "initial_digest": self._initial_digest,
            "completed_steps": self.completed_steps,
            "completed_windows": self.completed_windows,
            "steps_alone": self.steps_alone,
            "ledger": self.ledger.counts,
            "inbox": self._inbox.state(),
        }

    def _load_state(self, state: dict[str, Any]) -> None:
        self._initial_digest = state["initial_digest"]
        self.completed_steps = state["completed_steps"]
        self.completed_windows = state["completed_windows"]
        self.steps_alone = state["steps_alone"]
        self.ledger.resume(Resumption(state["attempt"], self.completed_steps), state["ledger"])
        self._inbox.load_state(state["inbox"])

    def _on_load_state(self, models: list[nn.Module], directory: str) -> None:
        super()._on_load_state(models, directory)
        # What this checkpoint and those beside it may ask for is kept from the first step on.
        self._retention.saved_below(Path(directory).absolute().parent)

    def _on_save_state(self, models: list[nn.Module], weights: list[Any], directory: str) -> None:
        super()._on_save_state(models, weights, directory)
        if self.accelerator.is_main_process:
            self._retention.saved_below(Path(directory).absolute().parent)

    def fates(self) -> dict[str, int]:
        """How many payloads met which fate, for ``results.json``.

        ``applied + dropped + rejected + skipped + pending = published``; ``alien`` counts files in
        the donor's directory that are no payloads.
        """
        if not self.accelerator.is_main_process:
            return dict(self.ledger.counts)
        pending = self._inbox.pending()
        return {
            **self.ledger.counts,
            "pending": pending,
            "published": self._inbox.num_settled() + pending,
            "alien": len(self.transport.alien_names("donor")),
        }

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
            "initial_weights_digest": self._initial_digest,
            "final_weights_digest": digest_tensors(model_state),
        }
        if isinstance(self._inbox, Replay):
            evidence["departed_at"] = self._inbox.departed_at
        return evidence


@dataclasses.dataclass(frozen=True, slots=True)
class _Injection:
    """An injected step that is not committed yet."""

    scale: float
    verdict: Verdict
