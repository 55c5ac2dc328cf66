"""One job with ``transformers.Trainer`` by itself, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.oracle import largest_difference

pytest.importorskip("transformers")

from transformers import Trainer, TrainingArguments

from tests.trainer_case import (
    BATCH_SIZE,
    Sequences,
    TrainerCase,
    build_dataset,
    build_model,
    collate,
)
from tests.unit.jobs import reset
from toolkit import BridgeConfig, BridgeError
from toolkit.bridge.runs import CHECKPOINT_FILE
from toolkit.transformers_trainer import DonorTrainer, ReceiverMixin, ReceiverTrainer

pytestmark = pytest.mark.usefixtures("fresh_state")


class Built:
    """A Trainer of some class, and its model."""

    def __init__(self, kind: type, directory: Path, tokens: bool = True, **settings: Any) -> None:
        reset()
        case = TrainerCase(tokens=tokens)
        self.model: Sequences = build_model(case, "h1")
        own = {
            "output_dir": str(directory),
            "per_device_train_batch_size": BATCH_SIZE["h1"],
            "gradient_accumulation_steps": case.accumulation,
            "learning_rate": 1e-2,
            "max_grad_norm": 0.05,
            "num_train_epochs": 2,
            "save_strategy": "no",
            "use_cpu": True,
            "disable_tqdm": True,
        }
        args = TrainingArguments(**{**own, **settings})
        bridge = BridgeConfig(
            runs_dir=directory / "runs", peer_wait=0.1, exchange="gradient", unit="tokens"
        )
        further = {} if kind is Trainer else {"bridge": bridge}
        dataset: Any = build_dataset(case, "h1")
        self.trainer = kind(self.model, args, collate, dataset, dataset, **further)


@pytest.mark.parametrize("tokens", [True, False], ids=["tokens", "samples"])
def test_that_a_receiver_alone_trains_as_the_trainer_does(tmp_path: Path, tokens: bool) -> None:
    weights = []
    for kind in (Trainer, ReceiverTrainer):
        built = Built(kind, tmp_path, tokens)
        built.trainer.train()
        weights.append(dict(built.model.state_dict()))
    assert largest_difference(*weights) <= 1e-12
    start = build_model(TrainerCase(tokens=tokens), "h1").state_dict()
    assert largest_difference(weights[1], dict(start)) > 1e-2
    assert torch.equal(weights[1]["heads.h2.weight"], start["heads.h2.weight"])


def test_that_the_optimizer_has_the_donors_head_and_ddp_does_not(tmp_path: Path) -> None:
    built = Built(ReceiverTrainer, tmp_path)
    optimizer = built.trainer.create_optimizer()
    in_groups = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for parameter in built.model.heads["h2"].parameters():
        assert id(parameter) in in_groups
        assert not parameter.requires_grad


def test_that_an_evaluation_says_after_which_step_the_weights_are(tmp_path: Path) -> None:
    built = Built(DonorTrainer, tmp_path, max_steps=3, eval_strategy="steps", eval_steps=1)
    for parameter in built.model.heads["h1"].parameters():
        parameter.requires_grad_(False)
    built.trainer.train()
    evaluations = [logs for logs in built.trainer.state.log_history if "eval_loss" in logs]
    assert [logs["eval_weights_step"] for logs in evaluations] == [1, 2, 3], "it was alone"


def test_that_a_frozen_part_of_a_donors_head_is_no_obstacle(tmp_path: Path) -> None:
    built = Built(DonorTrainer, tmp_path, num_train_epochs=1)
    built.model.heads["h1"].requires_grad_(False)
    weight = built.model.get_parameter("heads.h2.weight")
    weight.requires_grad_(False)  # as the base of adapters is
    before = weight.detach().clone()

    built.trainer.train()

    assert built.trainer.donor.windows_alone == 5
    assert not weight.requires_grad
    assert torch.equal(weight, before)


def test_that_the_bridge_begins_with_train(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"begins with train\(\)"):
        _ = Built(ReceiverTrainer, tmp_path).trainer.receiver


def test_that_an_error_leaves_the_stream_open_for_a_resume(tmp_path: Path) -> None:
    trainer = Built(ReceiverTrainer, tmp_path).trainer
    trainer.create_scheduler = None  # fails before the bridge begins
    with pytest.raises(TypeError):
        trainer.train()
    built = Built(ReceiverTrainer, tmp_path)
    built.trainer.compute_loss = None  # fails in the first step
    with pytest.raises(TypeError):
        built.trainer.train()
    receiver = built.trainer.receiver
    headers = [
        receiver.transport.read_header("receiver", sequence).kind
        for sequence in receiver.transport.sequences("receiver")
    ]
    assert "end" not in headers


@pytest.mark.parametrize("kind", [ReceiverTrainer, DonorTrainer])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"auto_find_batch_size": True}, "auto_find_batch_size"),
        ({"optim": "galore_adamw_layerwise"}, "steps within backward"),
    ],
)
def test_what_is_refused(
    tmp_path: Path, kind: type, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Built(kind, tmp_path, **settings)


def test_that_a_search_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="hyperparameter search"):
        Built(ReceiverTrainer, tmp_path).trainer.train(trial=object())


def test_that_a_checkpoint_without_the_bridge_is_refused(tmp_path: Path) -> None:
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 4}
    Built(Trainer, tmp_path, **saving).trainer.train()
    with pytest.raises(BridgeError, match="no complete checkpoint of a bridged job"):
        Built(ReceiverTrainer, tmp_path, **saving).trainer.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("is_path", [True, False])
def test_that_a_resume_goes_on_from_a_path_or_from_what_is_complete(
    tmp_path: Path, is_path: bool
) -> None:
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
    first = Built(ReceiverTrainer, tmp_path, **saving)
    first.trainer.train()
    for step in (6, 10):  # as a job leaves them that is killed while it saves
        (tmp_path / f"checkpoint-{step}" / CHECKPOINT_FILE).unlink()
    second = Built(ReceiverTrainer, tmp_path, **saving)

    second.trainer.train(tmp_path / "checkpoint-4" if is_path else True)

    receiver = second.trainer.receiver
    assert receiver.run_dir == first.trainer.receiver.run_dir
    assert receiver.steps_alone == receiver.completed_steps == second.trainer.state.global_step
    assert largest_difference(dict(first.model.state_dict()), dict(second.model.state_dict())) == 0


@pytest.mark.parametrize("limit", [1, 2])
def test_that_keeping_one_checkpoint_only_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, limit: int
) -> None:
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 4, "save_total_limit": limit}
    Built(ReceiverTrainer, tmp_path, **saving).trainer.train()
    assert ("save_total_limit=1 deletes" in caplog.text) == (limit == 1)


def test_that_a_second_backward_is_refused(tmp_path: Path) -> None:
    class Twice(Trainer):
        def training_step(self, model: Any, inputs: Any, *args: Any) -> Any:
            for _ in range(2):
                loss = self.compute_loss(model, inputs)
                self.accelerator.backward(loss)
            return loss.detach()

    class Receiver(ReceiverMixin, Twice):
        pass

    with pytest.raises(RuntimeError, match="twice for one micro-batch"):
        Built(Receiver, tmp_path).trainer.train()


def test_that_a_checkpoint_without_optimizer_has_no_position(tmp_path: Path) -> None:
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 4, "save_only_model": True}
    Built(ReceiverTrainer, tmp_path, **saving).trainer.train()
    assert list((tmp_path / "checkpoint-4").iterdir())
    assert not (tmp_path / "checkpoint-4" / "gradient_bridge.json").exists()
