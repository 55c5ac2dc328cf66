"""One job of a bridge in ``transformers.Trainer``, over cases of ``tests/trainer_case.py``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Sampler, SequentialSampler
from transformers import TrainerCallback, TrainingArguments

from tests.trainer_case import (
    BATCH_SIZE,
    DONOR_WEIGHT,
    LEARNING_RATE,
    MAX_GRAD_NORM,
    WEIGHT_DECAY,
    Sequences,
    TrainerCase,
    build_dataset,
    build_model,
    collate,
)
from toolkit import BridgeConfig, GradientDonor, GradientReceiver
from toolkit.transformers_trainer import DonorMixin, DonorTrainer, ReceiverMixin, ReceiverTrainer


class InOrder:
    """Takes the samples in their order, which the oracle then need not draw."""

    def _get_train_sampler(self, *args: Any) -> Sampler[int]:
        return SequentialSampler(self.train_dataset)  # type: ignore[attr-defined]


class Receiver(InOrder, ReceiverTrainer):
    """The receiver."""


class Donor(InOrder, DonorTrainer):
    """The donor."""


class Failing(TrainerCallback):
    """A job that dies after a step."""

    def __init__(self, fail_at: int) -> None:
        self.fail_at = fail_at

    def on_step_end(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        if state.global_step == self.fail_at:
            raise SystemExit("as the test wants it")


def arguments(case: TrainerCase, head: str, directory: Path, **changes: Any) -> TrainingArguments:
    """What both Trainers have alike."""
    return TrainingArguments(
        output_dir=str(directory / head),
        per_device_train_batch_size=BATCH_SIZE[head],
        gradient_accumulation_steps=case.accumulation if head == "h1" else case.donor_accumulation,
        learning_rate=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        max_grad_norm=MAX_GRAD_NORM,
        lr_scheduler_type="linear",
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        remove_unused_columns=False,
        **changes,
    )


def receive(case: TrainerCase, directory: Path, config: BridgeConfig) -> Sequences:
    """Train the receiver of a case."""
    model = build_model(case, "h1")
    saving = {"save_strategy": "steps", "save_steps": case.save_steps}
    args = arguments(
        case, "h1", directory, num_train_epochs=case.num_epochs,
        **saving if case.save_steps else {"save_strategy": "no"},
    )  # fmt: skip
    dataset = build_dataset(case, "h1")
    trainer = Receiver(model, args, collate, dataset, bridge=config, callbacks=[])
    if case.fail_at:
        trainer.add_callback(Failing(case.fail_at))
    step = case.resume_from
    trainer.train(str(directory / "h1" / f"checkpoint-{step}") if step else None)
    if trainer.accelerator.is_main_process:
        fates = trainer.receiver.fates()
        num_steps = case.num_steps(trainer.accelerator.num_processes)
        assert fates["applied"] == trainer.receiver.completed_steps == num_steps, fates
        logged = [
            entry["gradient/n_r over n_d donor (ratio)"] for entry in trainer.state.log_history[:-1]
        ]
        assert len(logged) == num_steps
    return model


def donate(case: TrainerCase, directory: Path, config: BridgeConfig) -> Sequences:
    """Follow the receiver of a case."""
    model = build_model(case, "h2")
    model.heads["h1"].requires_grad_(False)
    dataset = build_dataset(case, "h2")
    if case.donor_trainer:
        args = arguments(case, "h2", directory, max_steps=1000, save_strategy="no")
        trainer = Donor(model, args, collate, dataset, bridge=config)
        trainer.train()
        assert trainer.donor.windows_alone == 0
        return model
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=case.donor_accumulation)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    dataloader: Any = DataLoader(dataset, BATCH_SIZE["h2"], collate_fn=collate)  # type: ignore[arg-type]
    prepared, optimizer, dataloader = accelerator.prepare(model, optimizer, dataloader)
    with GradientDonor(accelerator, prepared, optimizer, config) as donor:
        for batch in donor.follow(dataloader):
            with accelerator.accumulate(prepared):
                total, count = model.summed_loss(**batch, head="h2")
                donor.backward(total / count, num_samples=count)
                assert donor.publish()
    return model


# -- deliberate faults: each makes the mixin wrong in one way ---------------------------------

_backward = GradientReceiver.backward


def _forget_accumulation(self: GradientReceiver, loss: Tensor, num_samples: float) -> None:
    _backward(self, loss / 3, num_samples)


def _never(self: ReceiverMixin) -> None:
    pass


def _late(self: ReceiverMixin) -> None:
    self.receiver.inject()


def _one(self: Any, *args: Any) -> float:
    return 1.0


MUTATIONS: dict[str, list[tuple[Any, str, Any]]] = {
    "": [],
    "forget_accumulation": [(GradientReceiver, "backward", _forget_accumulation)],
    "inject_after_clip": [
        (ReceiverMixin, "_end_micro_batch", _never),
        (ReceiverMixin, "_before_optimizer_step", _late),
    ],
    "each_micro_batch_as_one": [(DonorMixin, "_count", _one)],
}


def main() -> None:
    """Train every case of the list in one role."""
    parser = argparse.ArgumentParser()
    parser.add_argument("role", choices=["donor", "receiver"])
    parser.add_argument("cases", type=Path, help="JSON list of cases")
    parser.add_argument("output", type=Path, help="directory for runs and final weights")
    args = parser.parse_args()
    for number, fields in enumerate(json.loads(args.cases.read_text())):
        case = TrainerCase(**fields)
        directory = args.output / str(number)
        config = BridgeConfig(
            runs_dir=directory / "runs",
            exchange="gradient",
            unit="tokens" if case.tokens else "samples",
            require_peer=True,
            peer_wait=180.0,  # imports take long on a busy machine
            donor_weight=DONOR_WEIGHT,
        )
        patches = [mock.patch.object(*fault) for fault in MUTATIONS[case.mutation]]
        for patch in patches:
            patch.start()
        train = receive if args.role == "receiver" else donate
        model = train(case, directory, config)
        for patch in patches:
            patch.stop()
        rank = Accelerator().process_index
        save_file(model.state_dict(), directory / f"{args.role}-{rank}.safetensors")


if __name__ == "__main__":
    main()
