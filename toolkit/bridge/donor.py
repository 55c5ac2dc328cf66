"""The donor's side: the receiver's weights in, gradients of the donor's loss out.

While a donor follows, it computes gradients at the receiver's weights and never steps its own
optimizer. Where no receiver comes, or it fell silent, the donor trains alone; in the exchanges
``distill`` and ``head`` it always does.

In plain PyTorch, started by ``python`` or ``torchrun`` (see ``receiver`` too):

.. code-block:: python

    import torch
    from accelerate import Accelerator
    from my_project import build_model, cross_entropy, h2_dataloader
    from toolkit import GradientDonor

    model = build_model()  # bare or in DistributedDataParallel; heads.h1 requires no gradient
    optimizer = torch.optim.AdamW(model.parameters())  # for times without a receiver
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    with GradientDonor(accelerator, model, optimizer) as donor:
        for inputs, labels in donor.follow(h2_dataloader(), max_windows=10_000):
            loss = cross_entropy(model(inputs, "h2"), labels)
            donor.backward(loss, num_samples=len(labels))  # in place of loss.backward()
            if not donor.publish():
                optimizer.step()
            optimizer.zero_grad()
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from toolkit.bridge.accumulation import Window, scale_grads_
from toolkit.bridge.agreement import read_claim
from toolkit.bridge.batches import batches_from, windows_per_epoch
from toolkit.bridge.compression import check_compressible
from toolkit.bridge.config import Role
from toolkit.bridge.digests import Digest
from toolkit.bridge.errors import DiskError, Interrupted, PayloadError
from toolkit.bridge.gradient_sums import GradientSums
from toolkit.bridge.interruption import GRACE_SECONDS
from toolkit.bridge.job import BridgeJob
from toolkit.bridge.liveness import PeerWatch
from toolkit.bridge.loss_scale import FollowedLossScale
from toolkit.bridge.next_window import Decision, NextWindow
from toolkit.bridge.outer import LocalRound
from toolkit.bridge.own_weights import stream_of
from toolkit.bridge.payload import (
    Header,
    Kind,
    Record,
)
from toolkit.bridge.payload_outbox import PayloadOutbox
from toolkit.bridge.runs import read_checkpoint
from toolkit.bridge.terms import record_bytes
from toolkit.bridge.transport import READ_SECONDS
from toolkit.bridge.weights_inbox import WeightsInbox
from toolkit.inner_products import all_finite, is_finite, squared_norm
from toolkit.parameters import check_only_shared_trains, innermost_optimizer
from toolkit.sharding import reshard, shard_like

logger = logging.getLogger(__name__)


class GradientDonor(BridgeJob):
    """Gives a receiver the gradients of this job's loss, at the receiver's own weights.

    Args:
        accelerator: the job's accelerator.
        model: the prepared model, whole or sharded by FSDP2: the receiver's backbone and the
            donor's head.
        optimizer: its optimizer, used only while the donor trains alone.
        config: the settings; by default lockstep in ``runs``.
        backbone: name of the backbone's submodule.
        head: name of the submodule of the donor's head. Several donors of a run may have the same
            head, whose gradients then add, or different ones.

    Attributes:
        following: whether the present window serves a receiver.
        completed_windows: accumulation windows done, in this and earlier starts.
        windows_alone: those of this start that no receiver was followed in.
        receiver_step: the receiver step that this window's gradient is meant for (while alone: how
            many steps the weights are old, counted on).
        metrics: numbers of the newest window, plain floats, for ``accelerator.log``.
        stop_signal: of a signal that came, its number; else 0. See :meth:`interruptible`.
        stop_reason: why :meth:`follow` ended; empty where ``max_windows`` did it.
        output_dir: where this job's results belong.

    Raises:
        ValueError: for an unknown module, or shared parameters that the optimizer lacks.
        BridgeError: for a run that cannot be joined, or a job that is launched in a way that is not
            supported.
    """

    role: ClassVar[Role] = "donor"

    def _attach(self) -> None:
        check_only_shared_trains(self.model, self.shared)
        if len(self.shared.heads) != 1:
            raise ValueError(f"a donor gives gradients for one head, got {list(self.shared.heads)}")
        (self.head,) = self.shared.heads
        check_compressible(self._gradient_parameters(self.head), self.config.compression)
        self._writes_behind = False  # on the main process
        self._receiver_bytes = 0  # of its records, at most, as its newest claim says
        super()._attach()
        self.following = False
        self.windows_alone = 0
        self._in_window = False  # between a decision what a window is for and its publish()
        self.receiver_step = 0
        self.stop_reason = ""
        self._published_windows = 0
        self._weights: Header | None = None  # of the weights that are loaded
        self._is_alone = False
        self._round: LocalRound | None = None  # exchange "delta": the steps since these weights
        every = self.config.publish_every
        self._publish_every = 1 if every == "epoch" else every
        self._copies: dict[str, Tensor] = {}  # of its own weights, while they are published
        self._sums = GradientSums()
        self._own_published = -1  # windows after which the donor's own weights were published
        self._validation: dict[str, float] = {}  # what the next payload tells the receiver
        self._loss_scale = FollowedLossScale(self.accelerator)
        self.completed_windows = self.control.on_main(self._open_inbox)

    def _open_inbox(self) -> int:
        self.receiver = PeerWatch(self.transport, "receiver")
        read = functools.partial(self._reading.read, "receiver")
        is_resumed = self.attempt > 1
        self._inbox = WeightsInbox(self.job, self.transport, read, is_resumed=is_resumed)
        self._outbox = PayloadOutbox(self.transport, self._publisher, self._inbox, self.config)
        self._next_window = NextWindow(
            self._inbox, self._publisher, self.receiver, self._waiting, self.config
        )
        self._expect_late(self.config.writes_behind)
        if self.config.has_own_weights:
            self._own_weights = self._open_stream(stream_of(self.job))
        return self._inbox.completed_windows

    # -- the loop's calls ---------------------------------------------------------------------

    def follow(self, dataloader: DataLoader[Any], max_windows: int | None = None) -> Iterator[Any]:
        """Batches of ``dataloader``, over and over, until the receiver has ended.

        At the start of every accumulation window the receiver's weights are loaded into the
        model. Which batches come is a function of ``completed_windows`` alone, so that a
        restarted donor goes on where it stopped; with shuffling that needs
        ``DataLoaderConfiguration(use_seedable_sampler=True)``. Takes the place of the loops over
        epochs and batches.

        Args:
            dataloader: the training dataloader, prepared, or one of torch, whose sampler may be a
                ``DistributedSampler``.
            max_windows: an upper bound of ``completed_windows``; without one, a donor that no
                receiver joins goes on alone for ever.

        Yields:
            Its batches.

        Raises:
            PeerError: if the receiver does not come and ``require_peer`` is set.
        """
        per_epoch = windows_per_epoch(dataloader, self.accelerator)
        if self.config.publish_every == "epoch":
            self._publish_every = per_epoch
        while max_windows is None or self.completed_windows < max_windows:
            before = self.completed_windows
            epoch, offset = divmod(self.completed_windows, per_epoch)
            first = offset * self.accelerator.gradient_accumulation_steps
            for batch in batches_from(dataloader, epoch, first):
                if not self.begin_window():
                    return
                yield batch
                if self.completed_windows == max_windows:
                    self.end_round()
                    return
            if self.completed_windows == before:
                raise RuntimeError(
                    "a whole pass over the dataloader went by without publish() at a synchronised "
                    "micro-step"
                )

    def begin_window(self) -> bool:
        """Before the forward of every window: take the receiver's weights. A collective.

        For loops that are not written over :meth:`follow`, which calls it. Within a window it does
        nothing.

        Returns:
            False if the receiver has ended, or this job was interrupted: leave the loop.
        """
        if not self._in_window and not self._begin_window():
            return False
        self._in_window = True
        return True

    def backward(self, loss: Tensor, num_samples: float | Tensor) -> None:
        """Back-propagate one micro-batch, in place of ``accelerator.backward(loss)``.

        Args:
            loss: scalar, reduced over ``num_samples`` as ``config.loss_reduction`` says.
            num_samples: this rank's samples in the micro-batch.
        """
        self.accumulator.backward(loss, num_samples)

    def publish(self) -> bool:
        """At the synchronised micro-step: hand the gradient sum over. A collective.

        Returns:
            Whether this window's gradient is the receiver's: if True, do not clip, do not step the
            optimizer or the schedule. If False (the donor trains alone, or it takes the local steps
            of exchange ``delta``) ``.grad`` holds the exact mean (or sum) for an ordinary step.
        """
        if not self.accelerator.sync_gradients:
            return self.following
        self._resting.check()
        window = self.accumulator.close()
        self.accumulator.reduce_unmanaged_(self.parameters.items())
        self.completed_windows += 1
        self.receiver_step += self._round is not None
        self._in_window = False
        self.metrics = {
            f"loss/{self.job} (per sample)": window.loss,
            f"events/{self.job} follows (0 or 1)": float(self.following),
            **self._waiting.metrics(),
        }
        if self._round is not None or not self.following:
            if self._round is not None:
                self._round.add(window)
            else:
                self.windows_alone += 1
            if self.config.exchange == "head" and self.windows_alone % self._publish_every == 0:
                self._publish_window(window)
            mean = self.config.loss_reduction == "mean"
            divisor = window.count if mean and window.count else 1.0
            scale_grads_(self.parameters.values(), window.sum_factor / divisor)
            return False
        self._publish_window(window)
        for parameter in self.parameters.values():
            parameter.grad = None  # it is the receiver's now, and not the next window's
        return True

    @torch.no_grad()
    def end_round(self) -> None:
        """Exchange ``delta``: hand over what the local steps changed, once all are taken.

        A collective. :meth:`follow` and :meth:`begin_window` call it; call it after the last window
        of a loop of your own.
        """
        local = self._round
        if local is None or local.num_windows < self.config.local_steps:
            return
        self._round = None
        self._waiting.catch_up()
        changes = local.difference()
        finite = self.control.agree(all_finite(changes.values()) and local.count > 0)
        self._published_windows += local.num_windows
        if self.accelerator.is_main_process and not finite:
            logger.warning("no finite weights after the local steps: skip")
        self._publish_payload("delta" if finite else "skip", changes if finite else {}, local)

    @property
    def at_receiver_weights(self) -> bool:
        """Whether the model has weights as the receiver published them."""
        loaded = self._weights  # every local step since then has counted the receiver's one on
        return (
            self.following and loaded is not None and self.receiver_step == loaded.receiver_step + 1
        )

    @property
    def weights_step(self) -> int:
        """After which step the model has its present weights: that which an accuracy belongs to.

        Of the receiver, with this donor's local steps since; of a donor by itself its own. Read it
        between two windows, once the optimizer has stepped.
        """
        if not self.config.follows:
            return self.completed_windows
        return self.receiver_step - self.following  # which is one on, for the next gradient

    def report(self, validation: Mapping[str, float]) -> None:
        """Tell the receiver, with the next payload, what its weights are worth.

        A receiver without labels for this donor's head cannot measure that itself; it finds the
        values in its own ``metrics``.

        Args:
            validation: results on this donor's validation data, by name, finite.

        Raises:
            RuntimeError: if the model does not have the receiver's weights
                (:attr:`at_receiver_weights`).
        """
        if not self.at_receiver_weights:
            raise RuntimeError(
                "report() is about the receiver's weights, which this donor has changed or never "
                "had: look at at_receiver_weights first"
            )
        self._validation = {name: float(value) for name, value in validation.items()}

    # -- inside -------------------------------------------------------------------------------

    def _ask_whether_late(self) -> None:
        """On the main process: what the receiver's claim says; may be repeated."""
        claim = read_claim(self.transport, "receiver") or {}
        self._expect_late(self.config.writes_behind or bool(claim.get("writes_behind")))

    def _expect_late(self, writes_behind: bool) -> None:
        """On the main process: whether no step of the receiver waits for the next payload."""
        self._writes_behind = writes_behind
        if writes_behind:
            self._reading.read_ahead(self._inbox.next_records)

    def _read_bytes(self, job: str, sequence: int) -> memoryview:
        try:
            return self.transport.read(job, sequence, max_bytes=self._receiver_bytes)
        except PayloadError:  # no claim was read yet, or the receiver has more heads now
            claim = read_claim(self.transport, job) or {}
            self._receiver_bytes = int(claim.get("record_bytes", record_bytes(self.shared)))
            return self.transport.read(job, sequence, max_bytes=self._receiver_bytes)

    def _begin_window(self) -> bool:
        """Decide what the window is for and load the weights for it; False to stop."""
        if torch.is_autocast_enabled(self.accelerator.device.type):
            raise RuntimeError(
                "new weights would not be seen inside an open autocast context: iterate over "
                "follow() outside of it"
            )
        if self.config.follows:
            self.end_round()
        self._vote_to_stop()
        if self.stop_signal:
            self.stop_reason = "it was interrupted"
            return False
        if not self.config.follows:
            return self._begin_own_window()
        if self._round is not None:
            return True
        num_unread = 0
        while True:
            if self.accelerator.is_main_process:
                self._next_window.begin()
            decision = self._waiting.decide_on_peers(self._poll, grace=0)
            if decision.action == "alone":
                self._go_alone()
                return True
            if decision.action == "again":
                return True
            if decision.action == "skip":
                self._waiting.catch_up()
                self._publish_payload("skip", {}, None)
                continue
            if decision.sequence >= 0:
                mine = self._inbox.fetched if self.accelerator.is_main_process else None
                record = self._reading.read_everywhere(
                    "receiver", decision.sequence, decision.digest, mine
                )
                if record is None:  # replaced by newer ones meanwhile: decide again
                    num_unread += 1
                    self._check_reading(num_unread)
                    continue
                self._load(record)
            if decision.action == "stop":
                self.stop_reason = "the receiver has ended"
                return False
            return True

    def _check_reading(self, num_tries: int) -> None:
        """That some rank could not read the weights so often, on all ranks alike."""
        if num_tries * READ_SECONDS >= self.config.peer_wait:
            raise DiskError(
                f"not every rank could read the receiver's weights, in {num_tries} tries of "
                f"{READ_SECONDS:g} s each (--peer_wait {self.config.peer_wait:g}); what hindered "
                f"it is in its log. Let the hosts of all ranks read {self.run_dir}, then start "
                "this job again, with --resume_from_checkpoint if it has a checkpoint"
            )

    def _begin_own_window(self) -> bool:
        """The next window of a donor that trains by itself; False if the receiver has ended."""
        if self.config.exchange == "head":
            is_due = self._own_published < 0  # what a receiver may begin with
        else:
            is_due = self.windows_alone > 0 and self.windows_alone % self._publish_every == 0
        if is_due:
            self._publish_own_weights()
        if self._waiting.persist(lambda: self._inbox.look(self.receiver) is False):
            self.stop_reason = "the receiver has ended"
            return False
        self.receiver_step = self.completed_windows
        return True

    def _publish_own_weights(self, grace: float = math.inf) -> None:
        """Publish the weights that this donor has trained. A collective.

        Args:
            grace: as elsewhere; where it is finite they are published when this returns.
        """
        if self._own_published == self.completed_windows:
            return
        self._own_published = self.completed_windows
        self._waiting.catch_up(grace)
        is_behind = self.config.writes_behind and grace == math.inf
        weights = self._whole_weights(self.shared.weights, self._copies if is_behind else None)
        header = self._header("weights").of_weights("")  # their digest is filled in
        if not is_behind:
            self._waiting.persist(lambda: self._own_weights.publish_weights(header, weights), grace)
        elif self.accelerator.is_main_process:
            self._waiting.write_behind(lambda: self._own_weights.publish_weights(header, weights))

    def _poll(self) -> Decision | None:
        """On the main process: what the next window is for, or None to wait."""
        return self._next_window.poll(is_alone=self._is_alone, is_following=self.following)

    def _go_alone(self) -> None:
        if not self._is_alone:
            # Moments of an earlier time alone belong to weights that are long gone.
            innermost_optimizer(self.optimizer).state = defaultdict(dict)
        self._is_alone, self.following = True, False
        self.receiver_step += 1

    @torch.no_grad()
    def _load(self, record: Record) -> None:
        """Take over the receiver's weights and buffers, in place."""
        reshard(self.model)  # after an evaluation it may hold copies of the old ones
        for name, tensor in self.shared.crossing.items():
            tensor.copy_(shard_like(record.tensors[name], tensor))
        is_new_start = self._weights is None or self._weights.attempt != record.header.attempt
        self._weights = record.header
        if self.accelerator.is_main_process:
            self._inbox.note_loaded(record.header)
            self._next_window.note_loaded()
        if is_new_start:
            self._waiting.persist(self._ask_whether_late)
        self.receiver_step = record.header.receiver_step + 1
        self._is_alone, self.following = False, True
        if self.config.exchange == "delta":
            self._round = LocalRound(self._gradient_parameters(self.head))

    @torch.no_grad()
    def _publish_window(self, window: Window) -> None:
        parameters = self._gradient_parameters(self.head)
        grads = [parameter.grad for parameter in parameters.values()]
        if window.count and all(grad is None for grad in grads):
            raise RuntimeError(
                "no shared parameter got a gradient: the loss was not computed with the model that "
                "this donor was given"
            )
        self._waiting.catch_up()  # the one before is staged until it is written
        sums = self._sums.take(
            parameters,
            window.sum_factor / window.scale,
            stage=self._writes_behind,
            may_overwrite=self.following,
        )
        is_sent = self.accelerator.is_main_process and self.config.compression == "none"
        digest = Digest(sums) if is_sent else None
        squares = [squared_norm([tensor]) for tensor in sums.values()]
        local = all(map(is_finite, sums.values(), squares))
        local = local and window.count > 0 and math.isfinite(window.loss)
        finite = self.control.agree(local)
        if self.following and window.count:  # one without samples says nothing about the scale
            self._loss_scale.update(finite, window.scale)
        self._published_windows += 1
        if self.accelerator.is_main_process and not finite:
            logger.warning("no finite gradient at receiver step %d: skip", self.receiver_step)
        kind: Kind = "gradient" if finite else "skip"
        size = self._publish_payload(kind, sums if finite else {}, window, digest)
        if self.accelerator.is_main_process:
            self.metrics[f"bridge/payload {self.job} (MiB)"] = size / 2**20
            self.metrics[f"gradient/{self.job} sum norm"] = norm = math.sqrt(sum(squares))
            feedback = self._outbox.feedback
            if feedback is not None and finite and norm:
                ratio = feedback.residual_norm * window.count / norm
                self.metrics[f"bridge/residual {self.job} (gradient norms)"] = ratio

    def _publish_payload(
        self,
        kind: Kind,
        sums: dict[str, Tensor],
        window: Window | LocalRound | None,
        digest: Digest | None = None,
    ) -> int:
        """Publish a payload, after :meth:`_catch_up`; its size in bytes. A collective.

        Args:
            kind: of the payload.
            sums: its tensors; none in a skip.
            window: what they are summed over.
            digest: of the sums, where it has been begun.
        """
        header = dataclasses.replace(
            self._header(kind),
            count=window.count if window else 0.0,
            unit=self.config.unit,
            loss=window.loss if window and math.isfinite(window.loss) else None,
            validation={} if kind == "skip" else self._validation,
        )
        if kind != "skip":
            self._validation = {}
        mine = digest if sums else None
        return self._waiting.persist(lambda: self._hand_over(header, sums, mine))

    def _hand_over(self, header: Header, sums: dict[str, Tensor], digest: Digest | None) -> int:
        """On the main process: publish a payload, or begin to.

        Returns:
            Its size in bytes; of one that is only begun, that of the one before.
        """
        if not self._writes_behind:
            return self._outbox.publish(header, sums, digest)
        size = self._outbox.newest_bytes
        self._inbox.note_answer(header, self._publisher.next_sequence)
        self._waiting.write_behind(functools.partial(self._outbox.write, header, sums, digest))
        return size

    # -- checkpoints and results --------------------------------------------------------------

    def _state(self) -> dict[str, Any]:
        # Local steps that no payload holds yet will be taken again, on the same batches.
        unpublished = self._round.num_windows if self._round is not None else 0
        return {"completed_windows": self.completed_windows - unpublished}

    def _load_state(self, state: dict[str, Any]) -> None:
        # What was published after the checkpoint is published: go on after it.
        self.completed_windows = max(self.completed_windows, state["completed_windows"])

    def _on_save_state(self, models: list[nn.Module], weights: list[Any], directory: str) -> None:
        super()._on_save_state(models, weights, directory)
        if self.accelerator.is_main_process:
            self._outbox.save_feedback(Path(directory))

    def _on_load_state(self, models: list[nn.Module], directory: str) -> None:
        super()._on_load_state(models, directory)
        if self.accelerator.is_main_process:
            then = read_checkpoint(Path(directory))["completed_windows"]
            self._outbox.load_feedback(Path(directory), self.completed_windows - then)

    def _header(self, kind: Kind) -> Header:
        """Of a record that is published now."""
        weights = self._weights
        return Header(
            kind=kind,
            run_id=self.run_id,
            job=self.job,
            attempt=weights.attempt if weights else 0,
            receiver_step=weights.receiver_step if weights else 0,
            weights_digest=weights.weights_digest if weights else "",
            head=self.head,
            donor_step=self.completed_windows,
        )

    def _end_header(self) -> Header:
        return dataclasses.replace(self._header("end"), weights_digest="")

    def close(self) -> None:
        """Publish this job's last weights, if it trained by itself, and its end, and leave.

        A collective; safe to call twice. What the disk refuses is not published.
        """
        is_own = not self.config.follows or (self._is_alone and self.windows_alone)
        if not self._closed and is_own and self.config.has_own_weights:
            try:
                self._publish_own_weights(GRACE_SECONDS)
            except (DiskError, Interrupted) as error:
                logger.error("the last weights of the %s are not published: %s", self.job, error)
        super().close()

    @property
    def published_windows(self) -> int:
        """Windows of this start whose gradient (or skip) went to a receiver."""
        return self._published_windows
