"""A pretrained backbone with LoRA adapters in the README's scripts: the adapters alone cross."""

from __future__ import annotations

import importlib
import itertools
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from tests.examples import examples_of
from tests.launching import Launcher
from tests.oracle import largest_difference
from tests.recipes.running import TIMEOUT
from tests.recipes.test_readme import ROLES, diff_of
from tests.unit.jobs import reset
from toolkit import BridgeConfig, GradientReceiver
from toolkit.bridge import resting_parameters
from toolkit.bridge.config import FrozenRule

pytest.importorskip("peft")
pytest.importorskip("transformers")

from transformers import DistilBertConfig, DistilBertModel

NUM_CLASSES, NUM_ROWS, LENGTH, VOCABULARY = {"h1": 3, "h2": 4}, {"h1": 23, "h2": 17}, 6, 50
# What a user has already: data in local files, and the docstring's model on a local directory.
MY_PROJECT = """
import torch
from datasets import load_dataset
from torch.utils.data import DataLoader
from docstring import Model

class Classifier(Model):
    def forward(self, tokens, head):
        return self.heads[head](self.backbone(input_ids=tokens).last_hidden_state[:, 0])

def build_model():
    torch.manual_seed(0)
    return Classifier("pretrained", {"h1": 3, "h2": 4}).double()

def pairs(rows):
    return torch.tensor([r["tokens"] for r in rows]), torch.tensor([r["label"] for r in rows])

def h1_dataloader():
    rows = load_dataset("json", data_files="h1.json", split="train")
    return DataLoader(rows, batch_size=5, collate_fn=pairs)

def h2_dataloader():
    rows = load_dataset("parquet", data_files="h2.parquet", split="train")
    return DataLoader(rows, batch_size=7, collate_fn=pairs)
"""
SAVE = """
from safetensors.torch import save_model
save_model(accelerator.unwrap_model(model), "receiver.safetensors")
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's directory: a saved backbone, data in files, and a module that reads both."""
    from datasets import Dataset

    torch.manual_seed(7)
    config = DistilBertConfig(
        vocab_size=VOCABULARY, max_position_embeddings=LENGTH, dim=16, hidden_dim=32, n_layers=2,
        n_heads=2, dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    DistilBertModel(config).save_pretrained(tmp_path / "pretrained")
    for head, num_rows in NUM_ROWS.items():
        rows = Dataset.from_dict(
            {
                "tokens": torch.randint(VOCABULARY, (num_rows, LENGTH)).tolist(),
                "label": torch.randint(NUM_CLASSES[head], (num_rows,)).tolist(),
            }
        )
        if head == "h1":
            rows.to_json(tmp_path / "h1.json")
        else:
            rows.to_parquet(tmp_path / "h2.parquet")
    (tmp_path / "docstring.py").write_text(examples_of(resting_parameters)[0])
    (tmp_path / "my_project.py").write_text(MY_PROJECT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("docstring", "my_project"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def joint_weights(my_project: Any) -> dict[str, Tensor]:
    """Three epochs of both data sets in one process, as the README's scripts train."""
    model = my_project.build_model()
    optimizer = torch.optim.AdamW(model.parameters())
    own, donated = list(my_project.h1_dataloader()), itertools.cycle(my_project.h2_dataloader())
    for _ in range(3):
        for start in range(0, len(own), 2):
            window = own[start : start + 2]
            inputs, labels = (torch.cat(parts) for parts in zip(*window, strict=True))
            donor_inputs, donor_labels = next(donated)
            optimizer.zero_grad()
            loss = cross_entropy(model(inputs, "h1"), labels)
            (loss + cross_entropy(model(donor_inputs, "h2"), donor_labels)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    return dict(model.state_dict())


def test_that_adapters_train_as_in_one_job(launcher: Launcher, project: Path) -> None:
    assert len(re.findall(r"\S.*\n", examples_of(resting_parameters)[0])) <= 10
    for role in ROLES:
        lines = [line[1:] for line in diff_of(role) if not line.startswith("-")]
        text = "\n".join(lines) + (SAVE if role == "receiver" else "")
        (project / f"{role}.py").write_text(text)
    for job in [launcher(project / f"{role}.py", cwd=project) for role in ROLES]:
        job.wait(TIMEOUT)
    my_project: Any = importlib.import_module("my_project")

    weights, start = load_file("receiver.safetensors"), my_project.build_model().state_dict()
    assert largest_difference(weights, joint_weights(my_project)) <= 1e-12
    moved = {name for name, tensor in weights.items() if not torch.equal(tensor, start[name])}
    assert moved == {name for name in weights if "lora_" in name or name.startswith("heads.")}
    for role in ROLES:
        records = sorted(Path("runs/0001/bridge", role, "records").iterdir())
        crossed = load_file(records[0])  # the last one is the end
        assert set(crossed) == {name for name in moved if not name.startswith("heads.h1.")}


def test_how_many_bytes_cross(project: Path) -> None:
    my_project: Any = importlib.import_module("my_project")
    reset()
    sizes = {}
    rules: tuple[FrozenRule, ...] = ("rest", "cross")
    for rule in rules:
        model = my_project.build_model()
        model.heads["h2"].requires_grad_(False)
        optimizer = torch.optim.AdamW(model.parameters())
        config = BridgeConfig(runs_dir=rule, peer_wait=0.1, exchange="gradient", frozen=rule)
        with GradientReceiver(Accelerator(cpu=True), model, optimizer, config) as receiver:
            weights = receiver._whole_weights(receiver.shared.crossing)
            sums = receiver._gradient_parameters("heads.h2")
            sizes[rule] = [sum(t.numel() for t in some.values()) for some in (weights, sums)]
    adapters = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    assert sizes["rest"] == [adapters + 17 * 4] * 2
    assert sizes["cross"][1] > 4 * sizes["rest"][1]
