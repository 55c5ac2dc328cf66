"""The bridge inside of ``transformers.Trainer`` (``pip install "gradient-bridge[transformers]"``).

A callback comes too late: the Trainer has clipped by then. These mixins stand in ``training_step``,
so that the joint gradient is there before the Trainer clips, steps and logs as ever. The receiver:

.. code-block:: python

    from transformers import TrainingArguments
    from my_project import build_model, collate, h1_dataset
    from toolkit.transformers_trainer import ReceiverTrainer

    model = build_model("h1")  # its loss; with modules backbone, heads.h1 and heads.h2
    args = TrainingArguments("h1", num_train_epochs=2, gradient_accumulation_steps=3)
    trainer = ReceiverTrainer(model, args, collate, h1_dataset())  # bridge=BridgeConfig(...)
    trainer.train()
    trainer.save_model("h1")

The donor, which ends with the receiver, or at ``max_steps``:

.. code-block:: python

    from transformers import TrainingArguments
    from my_project import build_model, collate, h2_dataset
    from toolkit.transformers_trainer import DonorTrainer

    model = build_model("h2")
    model.heads["h1"].requires_grad_(False)  # only backbone and h2 can cross
    args = TrainingArguments("h2", max_steps=10_000)
    DonorTrainer(model, args, collate, h2_dataset()).train()

``class MyReceiver(ReceiverMixin, SFTTrainer)`` does the same with another Trainer. Either job may
be a plain loop instead.

What counts is what the Trainer divides by: the labelled tokens of all micro-batches and ranks
where it counts them (``num_items_in_batch``), and samples elsewhere. So the receiver's own part of
a step is the Trainer's gradient, in a short last window too. Only where the Trainer would average
the means of micro-batches, or with ``average_tokens_across_devices=False`` of ranks, of unequal
size, is it the mean over all samples or tokens instead. With ``rescale`` ``append`` or ``pool``
both jobs must count the same: say which by ``BridgeConfig(unit="tokens")`` in both.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_pt_utils import find_batch_size
from transformers.trainer_utils import SaveStrategy, get_last_checkpoint

from toolkit.bridge.config import BridgeConfig
from toolkit.bridge.donor import GradientDonor
from toolkit.bridge.job import BridgeJob
from toolkit.bridge.receiver import GradientReceiver
from toolkit.bridge.runs import CHECKPOINT_FILE
from toolkit.parameters import shared_parameters

_Base: Any = object  # whatever Trainer a mixin stands before

logger = logging.getLogger(__name__)


class _BridgeMixin(_Base):
    """What both sides have in common.

    Args:
        args: the Trainer's own, as ever.
        bridge: the settings; by default lockstep in ``runs``. Where the Trainer saves checkpoints,
            ``checkpoint_interval`` and ``checkpoints_kept`` are its own.
        backbone: name of the backbone's submodule.
        head: name of the submodule of the donor's head, or, in a receiver, several names.
        kwargs: the Trainer's own, as ever.
    """

    def __init__(
        self,
        *args: Any,
        bridge: BridgeConfig | None = None,
        backbone: str = "backbone",
        head: str | Sequence[str] = "heads.h2",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._check_supported()
        self._bridge_config = bridge or BridgeConfig()
        self._modules: dict[str, Any] = {"backbone": backbone, "head": head}
        self._job: BridgeJob | None = None
        self._checkpoint: Path | None = None  # to resume from
        self._exit = contextlib.ExitStack()
        self.add_callback(_Calls(self))

    def train(
        self,
        resume_from_checkpoint: str | os.PathLike[str] | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """As the Trainer's; the bridge's position is in every checkpoint but ``save_only_model``.

        ``resume_from_checkpoint=True`` takes the newest checkpoint that is complete: a job that is
        killed while it saves leaves one that is not.

        Raises:
            ValueError: for a hyperparameter search, each of whose trials would be a run.
            BridgeError: for a checkpoint without the bridge's position, or of another run.
        """
        if trial is not None:
            raise ValueError("a hyperparameter search is not supported: a run has one receiver")
        if resume_from_checkpoint is True:
            (newest,) = broadcast_object_list([self._newest_checkpoint()])  # one for all ranks
            resume_from_checkpoint = newest or True  # the Trainer has the error
        self._checkpoint = None
        if resume_from_checkpoint is not None and not isinstance(resume_from_checkpoint, bool):
            self._checkpoint = Path(resume_from_checkpoint)
        with contextlib.ExitStack() as self._exit:
            return super().train(resume_from_checkpoint, None, ignore_keys_for_eval)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """The Trainer's, with the bridge's ``backward`` in place of the accelerator's."""
        num_micro_batches = self.current_gradient_accumulation_steps
        count = self._count(inputs, num_items_in_batch)

        def backward(loss: Tensor, **kwargs: Any) -> None:
            self.accelerator.__dict__.pop("backward")  # which the bridge itself calls
            # The Trainer has divided by the number of micro-batches: as such, or with the items of
            # the whole window. Thus it is the mean over this micro-batch's share of the items.
            self._bridge.backward(loss * num_micro_batches, count)
            self.accelerator.__dict__["backward"] = refuse

        def refuse(loss: Tensor, **kwargs: Any) -> None:
            raise RuntimeError(
                "training_step() called accelerator.backward() twice for one micro-batch, whose "
                "samples count once: add its losses up and call it once"
            )

        self.accelerator.__dict__["backward"] = backward
        try:
            loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        finally:
            self.accelerator.__dict__.pop("backward", None)
        self._end_micro_batch()
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As the Trainer's, with the bridge's numbers of the newest step beside the loss."""
        metrics = self._job.metrics if self._job is not None and "loss" in logs else {}
        super().log({**metrics, **logs}, *args, **kwargs)

    def create_optimizer(self, *args: Any) -> torch.optim.Optimizer:
        """As the Trainer's, which leaves out what is frozen, with all of the donors' heads."""
        heads = self._head_parameters()
        frozen = [parameter for parameter in heads if not parameter.requires_grad]
        for parameter in frozen:
            parameter.requires_grad_(True)
        try:
            return super().create_optimizer(*args)
        finally:
            for parameter in frozen:
                parameter.requires_grad_(False)

    # -- what the sides do their own way ------------------------------------------------------

    def _open(self, config: BridgeConfig) -> BridgeJob:
        raise NotImplementedError

    def _end_micro_batch(self) -> None:
        raise NotImplementedError

    def _before_optimizer_step(self) -> None:
        """After the Trainer's clipping."""

    def _after_optimizer_step(self) -> None:
        """Before anything is logged or saved."""

    def _end_training(self) -> None:
        """After the last step."""

    # -- inside -------------------------------------------------------------------------------

    @property
    def _bridge(self) -> Any:
        if self._job is None:
            raise RuntimeError("the bridge begins with train()")
        return self._job

    def _head_parameters(self) -> list[nn.Parameter]:
        head = self._modules["head"]
        heads = (head,) if isinstance(head, str) else tuple(head)
        return list(shared_parameters(self.model, self._modules["backbone"], heads).head.values())

    def _check_supported(self) -> None:
        reason = ""
        if self.args.n_gpu > 1:
            reason = "DataParallel in one process: start one for each GPU, by accelerate launch"
        elif self.is_fsdp_enabled or self.is_deepspeed_enabled:
            reason = "FSDP or DeepSpeed in a Trainer, whose checkpoints would lack the donor's head"
        elif self.args.auto_find_batch_size:
            reason = "auto_find_batch_size, which begins anew after an error"
        elif any(word in str(self.args.optim).lower() for word in ("lomo", "layerwise")):
            reason = f"optim {self.args.optim}, which steps within backward(), before any injection"
        if reason:
            raise ValueError(f"the bridge does not support {reason}")

    def _count(self, inputs: dict[str, Any], num_items_in_batch: Any) -> float:
        """This rank's samples, or its share of the window's items, for one micro-batch."""
        if num_items_in_batch is None:
            return float(find_batch_size(inputs))
        over_ranks = self.args.average_tokens_across_devices
        num_ranks = self.accelerator.num_processes if over_ranks else 1
        return float(num_items_in_batch) / (num_ranks * self.current_gradient_accumulation_steps)

    def _newest_checkpoint(self) -> str | None:
        """The newest one with the bridge's position, which is saved last; without any, the newest.

        None where there is no checkpoint.
        """
        directory = Path(self.args.output_dir)
        complete = directory.glob(f"checkpoint-*/{CHECKPOINT_FILE}")
        ends = [path.parent.name.rpartition("-")[2] for path in complete]
        steps = [int(end) for end in ends if end.isdigit()]
        if not steps:
            return get_last_checkpoint(str(directory))
        return str(directory / f"checkpoint-{max(steps)}")

    def _begin(self) -> None:
        """Model, optimizer and checkpoint are ready."""
        if self._saves_position and self.args.save_total_limit == 1 and self.args.should_save:
            logger.warning(
                "save_total_limit=1 deletes the last checkpoint before the new one is complete: a "
                "job that is killed just then cannot be resumed; 2 always keeps one to resume from"
            )
        config = dataclasses.replace(self._bridge_config, **self._settings())
        self._job = self._exit.enter_context(self._open(config))
        if self._checkpoint is not None:
            self._job.load_position(self._checkpoint)

    def _settings(self) -> dict[str, Any]:
        """What the Trainer's arguments say of the bridge."""
        settings: dict[str, Any] = {}
        steps_per_epoch = max(1, math.ceil(self.state.max_steps / self.state.num_train_epochs))
        if self._bridge_config.publish_every == "epoch":
            settings["publish_every"] = steps_per_epoch
        if self._checkpoint is not None:
            settings |= {"run": None, "resume_from_checkpoint": self._checkpoint}
        if self._saves_position:
            by_steps = self.args.save_strategy == SaveStrategy.STEPS
            interval = self.state.save_steps if by_steps else steps_per_epoch
            kept = self.args.save_total_limit
            settings |= {"checkpoint_interval": interval, "checkpoints_kept": kept}
        return settings

    @property
    def _saves_position(self) -> bool:
        return self.args.save_strategy != SaveStrategy.NO and not self.args.save_only_model

    def _save_position(self) -> None:
        """The Trainer has saved a checkpoint."""
        if not self._saves_position:
            return
        directory = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
        if (obstacle := self._bridge.obstacle_to_saving) is None:
            self._bridge.save_position(directory)
        elif self.accelerator.is_main_process:
            logger.warning("no resume from %s will be possible: %s", directory, obstacle)


class _Calls(TrainerCallback):
    """Tells a mixin where its Trainer has come to."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._trainer._begin()

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._trainer._before_optimizer_step()

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._trainer._after_optimizer_step()

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        self._trainer._save_position()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self._trainer._end_training()


class ReceiverMixin(_BridgeMixin):
    """Makes a Trainer the receiver: ``class MyReceiver(ReceiverMixin, MyTrainer)``.

    It freezes the donors' heads, so that DDP does not wait for them, and lets the optimizer have
    them all the same. To learn from a teacher while a donor is away, override ``compute_loss`` and
    add ``self.receiver.teacher_loss(...)`` where ``self.receiver.taught_heads`` is not empty.

    Raises:
        ValueError: for a module that is not there, or a setting of the Trainer that the bridge does
            not support, saying which.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for parameter in self._head_parameters():
            parameter.requires_grad_(False)

    @property
    def receiver(self) -> GradientReceiver:
        """The bridge's side of this job, once ``train()`` has begun."""
        job: GradientReceiver = self._bridge
        return job

    def _open(self, config: BridgeConfig) -> GradientReceiver:
        return GradientReceiver(
            self.accelerator, self.model_wrapped, self.optimizer, config, **self._modules
        )

    def _end_micro_batch(self) -> None:
        self.receiver.inject()

    def _after_optimizer_step(self) -> None:
        self.receiver.commit()


class DonorMixin(_BridgeMixin):
    """Makes a Trainer a donor: ``class MyDonor(DonorMixin, MyTrainer)``.

    While it follows a receiver, ``global_step`` and the learning rate's schedule count its windows
    and the optimizer does not step. ``max_steps`` or ``num_train_epochs`` bound them: give more
    than the receiver has steps. A donor that is started again after a kill takes its batches from
    where its Trainer begins: from the first one, or where a checkpoint was saved.

    Raises:
        ValueError: for a setting of the Trainer that the bridge does not support, saying which.
    """

    _is_donated = False  # the gradients of this step

    @property
    def donor(self) -> GradientDonor:
        """The bridge's side of this job, once ``train()`` has begun."""
        job: GradientDonor = self._bridge
        return job

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As the Trainer's; an evaluation says too after which receiver step its weights are."""
        if self._job is not None and "eval_loss" in logs:
            logs = {**logs, "eval_weights_step": self.donor.weights_step}
        super().log(logs, *args, **kwargs)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], *args: Any) -> tuple[list[Any], Any]:
        """The Trainer's next window, once the receiver's weights for it are loaded."""
        if self.donor.begin_window():
            window: tuple[list[Any], Any] = super().get_batch_samples(epoch_iterator, *args)
            return window
        self.control.should_training_stop = True
        return [], None

    def _check_supported(self) -> None:
        super()._check_supported()
        if self.accelerator.scaler is not None:
            raise ValueError("the bridge does not support fp16 in a donor's Trainer: use bf16")

    def _open(self, config: BridgeConfig) -> GradientDonor:
        return GradientDonor(
            self.accelerator, self.model_wrapped, self.optimizer, config, **self._modules
        )

    def _end_micro_batch(self) -> None:
        self._is_donated = self.donor.publish()

    def _before_optimizer_step(self) -> None:
        if self._is_donated:
            self.accelerator.gradient_state._set_sync_gradients(False)  # step() does nothing then

    def _after_optimizer_step(self) -> None:
        self.accelerator.gradient_state._set_sync_gradients(True)

    def _end_training(self) -> None:
        self.donor.end_round()


class ReceiverTrainer(ReceiverMixin, Trainer):
    """``transformers.Trainer`` as the receiver."""


class DonorTrainer(DonorMixin, Trainer):
    """``transformers.Trainer`` as a donor."""
