"""The donor's side: the receiver's weights in, gradients of the donor's loss out.

While a donor follows, it computes gradients at the receiver's weights and never steps its own
optimizer. Where no receiver comes, or it fell silent, the donor trains alone.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
from accelerate import skip_first_batches
from torch import Tensor
from torch.utils.data import DataLoader

from toolkit.bridge.accumulation import Window, scale_grads_
from toolkit.bridge.config import Role
from toolkit.bridge.errors import BridgeError
from toolkit.bridge.job import BridgeJob
from toolkit.bridge.loss_scale import FollowedLossScale
from toolkit.bridge.payload import Header, Kind, Record, all_finite, payload_dtype
from toolkit.bridge.weights_inbox import WeightsInbox
from toolkit.parameters import check_only_shared_trains, innermost_optimizer, squared_norm
from toolkit.sharding import full_tensor, reshard, shard_like

logger = logging.getLogger(__name__)

MAX_REPLACEMENTS = 1  # of a rejected payload by another; after that a skip record takes its place


@dataclasses.dataclass(frozen=True, slots=True)
class _Decision:
    """What the donor's next accumulation window is for."""

    action: Literal["follow", "again", "skip", "alone", "stop"]
    sequence: int = -1  # of the weights to load
    digest: str = ""


class GradientDonor(BridgeJob):
    """Gives a receiver the gradients of this job's loss, at the receiver's own weights.

    Args:
        accelerator: the job's accelerator.
        model: the prepared model, whole or sharded by FSDP2: the receiver's backbone and the
            donor's head.
        optimizer: its optimizer, used only while the donor trains alone.
        config: the settings; by default lockstep in ``runs``.
        backbone: name of the backbone's submodule.
        head: name of the submodule of the donor's head.

    Attributes:
        following: whether the present window's gradient goes to a receiver.
        completed_windows: accumulation windows done, in this and earlier starts.
        windows_alone: those of this start that no receiver was followed in.
        receiver_step: the receiver step that this window's gradient is meant for (while alone: how
            many steps the weights are old, counted on).
        metrics: numbers of the newest window, plain floats, for ``accelerator.log``.
        output_dir: where this job's results belong.

    Raises:
        ValueError: for an unknown module, or shared parameters that the optimizer lacks.
        BridgeError: for a run that cannot be joined, or a job that is launched in a way that is not
            supported.
    """

    role: ClassVar[Role] = "donor"

    def _attach(self) -> None:
        check_only_shared_trains(self.model, self.shared)
        super()._attach()
        self.following = False
        self.windows_alone = 0
        self._in_window = False  # between a decision what a window is for and its publish()
        self.receiver_step = 0
        self.stop_reason = ""
        self._published_windows = 0
        self._wait_seconds = 0.0
        self._weights: Header | None = None  # of the weights that are loaded
        self._is_alone = False
        self._replacements = 0  # at the present weights
        self._payload_bytes = 0  # of the largest payload so far
        self._loss_scale = FollowedLossScale(self.accelerator)
        self.completed_windows = self.control.on_main(self._open_inbox)

    def _open_inbox(self) -> int:
        self._inbox = WeightsInbox(self.transport, self._read)
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
            dataloader: the prepared training dataloader.
            max_windows: an upper bound of ``completed_windows``; without one, a donor that no
                receiver joins goes on alone for ever.

        Yields:
            Its batches.

        Raises:
            PeerError: if the receiver does not come and ``require_peer`` is set.
        """
        if not len(dataloader):
            raise ValueError("the dataloader to follow is empty")
        if not self.accelerator.gradient_state.sync_with_dataloader:
            raise ValueError(
                "follow() needs accumulation windows that end with the dataloader: leave "
                "GradientAccumulationPlugin(sync_with_dataloader=True) as it is"
            )
        accumulation = self.accelerator.gradient_accumulation_steps
        windows_per_epoch = math.ceil(len(dataloader) / accumulation)
        while max_windows is None or self.completed_windows < max_windows:
            before = self.completed_windows
            epoch, offset = divmod(self.completed_windows, windows_per_epoch)
            if hasattr(dataloader, "set_epoch"):
                dataloader.set_epoch(epoch)
            rest = skip_first_batches(dataloader, offset * accumulation) if offset else dataloader
            for batch in rest:
                if not self._in_window and not self._begin_window():
                    return
                self._in_window = True
                yield batch
                if self.completed_windows == max_windows:
                    return
            if self.completed_windows == before:
                raise RuntimeError(
                    "a whole pass over the dataloader went by without publish() at a synchronised "
                    "micro-step"
                )

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
            Whether this window is the receiver's: if True, do not clip, do not step the optimizer
            or the schedule. If False the donor trains alone, and ``.grad`` holds the exact mean
            (or sum) for an ordinary step.
        """
        if not self.accelerator.sync_gradients:
            return self.following
        window = self.accumulator.close()
        self.accumulator.reduce_unmanaged_(self.parameters.items())
        self.completed_windows += 1
        self._in_window = False
        self.metrics = {
            "loss/donor (per sample)": window.loss,
            "bridge/wait (s)": self._wait_seconds,
        }
        if not self.following:
            self.windows_alone += 1
            mean = self.config.loss_reduction == "mean"
            divisor = window.count if mean and window.count else 1.0
            scale_grads_(self.parameters.values(), window.sum_factor / divisor)
            return False
        self._publish_window(window)
        for parameter in self.parameters.values():
            parameter.grad = None  # it is the receiver's now, and not the next window's
        return True

    # -- inside -------------------------------------------------------------------------------

    def _begin_window(self) -> bool:
        """Decide what the window is for and load the weights for it; False to stop."""
        if torch.is_autocast_enabled(self.accelerator.device.type):
            raise RuntimeError(
                "new weights would not be seen inside an open autocast context: iterate over "
                "follow() outside of it"
            )
        while True:
            decision, self._wait_seconds = self._decide(
                "the receiver's next weights", self._poll, self._give_up
            )
            if decision.action == "alone":
                self._go_alone()
                return True
            if decision.action == "again":
                return True
            if decision.action == "skip":
                if self.accelerator.is_main_process:
                    self._publish_payload("skip", {}, None)
                continue
            if decision.sequence >= 0:
                mine = self._inbox.fetched if self.accelerator.is_main_process else None
                record = self._read_everywhere(decision.sequence, decision.digest, mine)
                if record is None:
                    continue  # replaced by newer ones meanwhile: decide again
                self._load(record)
            if decision.action == "stop":
                self.stop_reason = "the receiver has ended"
                return False
            return True

    def _poll(self) -> _Decision | None:
        """On the main process: one look at the receiver's stream."""
        is_new = self._inbox.look(self.peer)
        if is_new is not None:
            fetched = self._inbox.fetched
            action: Literal["follow", "stop"] = "follow" if is_new else "stop"
            if fetched is None:
                return _Decision(action)
            return _Decision(action, fetched.header.sequence, fetched.header.tensors_digest)
        if self._is_alone:
            return _Decision("alone")
        if self.following:
            reason = self.transport.rejection(self.role, self._next_sequence - 1)
            if reason is not None:
                logger.warning("the receiver rejected the last payload (%s)", reason)
                self._replacements += 1
                return _Decision("again" if self._replacements <= MAX_REPLACEMENTS else "skip")
        return None

    def _give_up(self, reason: str) -> _Decision:
        logger.warning(
            "TRAINING ALONE: %s. The donor trains its own backbone and head from here on, until a "
            "receiver publishes weights",
            reason,
        )
        return _Decision("alone")

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
        for name, tensor in self.shared.weights.items():
            tensor.copy_(shard_like(record.tensors[name], tensor))
        self._weights = record.header
        if self.accelerator.is_main_process:
            self._inbox.note_loaded(record.header)
        self.receiver_step = record.header.receiver_step + 1
        self._is_alone, self.following, self._replacements = False, True, 0

    @torch.no_grad()
    def _publish_window(self, window: Window) -> None:
        grads = [parameter.grad for parameter in self.gradient_parameters.values()]
        if window.count and all(grad is None for grad in grads):
            raise RuntimeError(
                "no shared parameter got a gradient: the loss was not computed with the model that "
                "this donor was given"
            )
        sums: dict[str, Tensor] = {}
        for name, parameter in self.gradient_parameters.items():
            dtype = payload_dtype(parameter.dtype)
            if parameter.grad is None:
                sums[name] = torch.zeros(parameter.shape, dtype=dtype)
            else:
                grad = full_tensor(parameter.grad).to(dtype=dtype)
                sums[name] = (grad * (window.sum_factor / window.scale)).cpu().contiguous()
        local = all_finite(sums.values()) and window.count > 0 and math.isfinite(window.loss)
        finite = self.control.agree(local)
        if window.count:  # a window without samples says nothing about the scale
            self._loss_scale.update(finite, window.scale)
        self._published_windows += 1
        if self.accelerator.is_main_process:
            if not finite:
                logger.warning("no finite gradient at receiver step %d: skip", self.receiver_step)
            kind: Kind = "gradient" if finite else "skip"
            size = self._publish_payload(kind, sums if finite else {}, window)
            self.metrics["bridge/payload (MiB)"] = size / 2**20
            self.metrics["gradient/donor sum norm"] = math.sqrt(squared_norm(sums.values()))

    def _publish_payload(self, kind: Kind, sums: dict[str, Tensor], window: Window | None) -> int:
        weights = self._weights
        assert weights is not None
        self._prune()
        header = Header(
            kind=kind,
            run_id=self.run_id,
            job=self.role,
            attempt=weights.attempt,
            receiver_step=weights.receiver_step,
            weights_digest=weights.weights_digest,
            donor_step=self.completed_windows,
            count=window.count if window else 0.0,
            unit=self.config.unit,
            loss=window.loss if window and math.isfinite(window.loss) else None,
        )
        size = self._publish(header, sums)
        self._inbox.note_answer(header, self._next_sequence - 1)
        self._payload_bytes = max(self._payload_bytes, size)
        return size

    def _prune(self) -> None:
        """Delete what will never be asked for again; refuse to grow beyond the budget."""
        acknowledged = self.transport.acknowledged(self.role)
        self.transport.prune(self.role, acknowledged)
        self._inbox.forget_below(acknowledged)
        kept = len(self.transport.sequences(self.role))
        gib = kept * self._payload_bytes / 2**30
        config = self.config
        if kept > config.payload_budget_files or gib > config.payload_budget_gib:
            raise BridgeError(
                f"{kept} payloads ({gib:.2f} GiB) are unacknowledged, the budget is "
                f"{config.payload_budget_files} (--payload_budget_files) and "
                f"{config.payload_budget_gib:g} GiB (--payload_budget_gib). The receiver needs "
                f"them for its oldest checkpoint: keep fewer (--checkpoints_total_limit)"
            )

    # -- checkpoints and results --------------------------------------------------------------

    def _state(self) -> dict[str, Any]:
        return {"completed_windows": self.completed_windows}

    def _load_state(self, state: dict[str, Any]) -> None:
        # What was published after the checkpoint is published: go on after it.
        self.completed_windows = max(self.completed_windows, state["completed_windows"])

    def _end_header(self) -> Header:
        return Header(
            kind="end",
            run_id=self.run_id,
            job=self.role,
            attempt=self._weights.attempt if self._weights else 0,
            receiver_step=self._weights.receiver_step if self._weights else 0,
            weights_digest="",
            donor_step=self.completed_windows,
        )

    @property
    def published_windows(self) -> int:
        """Windows of this start whose gradient (or skip) went to a receiver."""
        return self._published_windows
