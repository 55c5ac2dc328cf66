"""Exact evaluation, checkpoints and result files."""

from __future__ import annotations

import argparse
import json
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)

from toolkit.data import NO_LABEL, make_dataset
from toolkit.training import (
    banner,
    evaluate,
    final_weights,
    new_output_dir,
    output_directory,
    write_results,
)


class Reader(nn.Module):
    """Predicts class 1 for h1 and class 0 for h2 where a 1 x 1 image is bright."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.batch_sizes: list[int] = []

    def forward(self, images: Tensor, heads: tuple[str, ...]) -> dict[str, Tensor]:
        assert not self.training
        self.batch_sizes.append(len(images))
        bright = images.flatten(1) * self.scale - 0.5
        logits = {"h1": torch.cat([-bright, bright], 1), "h2": torch.cat([bright, -bright], 1)}
        return {head: logits[head] for head in heads}


def test_evaluation_counts_labelled_images_once() -> None:
    images = np.array([0, 1, 1, 0, 1], dtype=np.float32).reshape(5, 1, 1, 1)
    labels = {
        "h1": np.array([0, 1, 1, 1, NO_LABEL]),
        "h2": np.array([1, NO_LABEL, NO_LABEL, NO_LABEL, 1]),
        "h3": np.full(5, NO_LABEL),
    }
    dataset = make_dataset(images, labels)
    model = Reader().train()
    accelerator = Accelerator(cpu=True)
    assert evaluate(accelerator, model, dataset, ("h1", "h2"), 2) == {"h1": 75.0, "h2": 50.0}
    assert model.training
    assert model.batch_sizes == [2, 2, 1]
    assert evaluate(accelerator, model, dataset.select([]), ("h1",), 2) == {}


def test_banner() -> None:
    assert banner("Running training", {"Ranks": 2}) == "***** Running training *****\n  Ranks = 2"


def test_output_dirs_are_numbered(tmp_path: Path) -> None:
    Accelerator(cpu=True)
    (tmp_path / "runs" / "joint-0002").mkdir(parents=True)
    names = [new_output_dir(tmp_path / "runs", "joint").name for _ in range(2)]
    assert names == ["joint-0001", "joint-0003"]


def test_where_a_recipe_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Accelerator(cpu=True)
    monkeypatch.chdir(tmp_path)
    asked, checkpoint = tmp_path / "asked", str(tmp_path / "earlier" / "step_3")
    for output_dir, resumed, expected in (
        (asked, checkpoint, asked),
        (None, checkpoint, tmp_path / "earlier"),
        (None, None, Path("runs/joint-0001")),
    ):
        args = argparse.Namespace(output_dir=output_dir, resume_from_checkpoint=resumed)
        assert output_directory(args, "joint") == expected


def test_results(tmp_path: Path) -> None:
    state = {"heads.h1.weight": torch.arange(6.0).reshape(2, 3).T}
    write_results(tmp_path / "out", {"recipe": "joint"}, state)
    write_results(tmp_path / "out", {"recipe": "again"}, state)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "model.safetensors",
        "results.json",
    ]
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == {"recipe": "again"}
    weights = tmp_path / "out" / "model.safetensors"
    assert torch.equal(load_file(weights)["heads.h1.weight"], state["heads.h1.weight"])
    assert stat.S_IMODE(weights.stat().st_mode) == stat.S_IMODE(
        (tmp_path / "out" / "results.json").stat().st_mode
    )


def test_that_final_weights_have_plain_names() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    apply_activation_checkpointing(model)
    compiled: Any = torch.compile(model[1], backend="eager")
    model[1] = compiled
    accelerator = Accelerator(cpu=True)
    names = list(final_weights(accelerator, accelerator.prepare(model)))
    assert names == ["0.weight", "0.bias", "1.weight", "1.bias"]
