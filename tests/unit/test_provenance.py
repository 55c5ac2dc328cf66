"""Arguments that are recorded give the same arguments again."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from accelerate import Accelerator

from recipes.receiver import parse_arguments
from tests.unit.jobs import reset
from toolkit.provenance import flags_of, provenance
from toolkit.verify import NOT_REPEATED

EVERY_KIND = [
    "--task=overlap", "--learning_rate=0.0123456789", "--max_grad_norm=1", "--num_train_epochs=2",
    "--max_staleness=3", "--aggregate=pcgrad", "--keep_payloads", "--output_dir=-strange name",
    "--checkpointing_steps=epoch", "--donor_weight=1e-3", "--run=-mine", "--lr_head2=0.25",
    "--optimizer=sgd", "--optimizer_args", "momentum=0.9", "nesterov=True",
    "--donor_heads", "h3", "h2",
]  # fmt: skip
OWN_DATA = [
    "--dataset_name=own.parquet", "--num_classes", "10", "5", "--image_shape", "1", "8", "9",
    "--label_column=digit", "--dtype=float64", "--loss_reduction=sum", "--require_peer",
]  # fmt: skip


def parse(monkeypatch: pytest.MonkeyPatch, flags: list[str]) -> dict[str, object]:
    monkeypatch.setattr(sys, "argv", ["receiver.py", *flags])
    return vars(parse_arguments())


@pytest.mark.parametrize("flags", [[], EVERY_KIND, OWN_DATA], ids=["none", "every kind", "own"])
def test_that_recorded_arguments_give_the_same_arguments(
    monkeypatch: pytest.MonkeyPatch, flags: list[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["receiver.py", *flags])
    args = parse_arguments()
    reset()
    recorded = json.loads(json.dumps(provenance(Accelerator(cpu=True), args)))["arguments"]

    assert parse(monkeypatch, flags_of(recorded)) == vars(args)


def test_that_weights_of_heads_give_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {"heads.h2": 0.7, "heads.h3": 0.0}
    heads = ["--donor_heads", "h2", "h3"]
    recorded = parse(monkeypatch, [*heads, "--donor_weight", "heads.h2=0.7, heads.h3=0"])

    assert recorded["donor_weight"] == weights
    flags = flags_of(json.loads(json.dumps({"donor_weight": weights})))
    assert parse(monkeypatch, [*heads, *flags]) == recorded


def test_that_only_what_the_weights_depend_on_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = parse(monkeypatch, [*EVERY_KIND, "--checkpoints_total_limit=2"])
    repeated = parse(monkeypatch, flags_of(recorded, leave_out=NOT_REPEATED))

    changed = {name for name in recorded if repeated[name] != recorded[name]}
    assert changed == {
        "run", "keep_payloads", "output_dir", "checkpointing_steps", "checkpoints_total_limit",
    }  # fmt: skip
    assert set(NOT_REPEATED) <= set(recorded), "a flag of that name is no more"


def test_that_the_environment_is_what_bits_depend_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["receiver.py"])
    reset()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    recorded = provenance(Accelerator(cpu=True), parse_arguments())["environment"]

    assert recorded["torch"] == torch.__version__
    assert recorded["python"] == sys.version.split()[0]
    assert (recorded["device"], recorded["mixed_precision"]) == ("cpu", "no")
    assert recorded["dynamo_backend"] == "NO"
    assert recorded["num_threads"] == 3
