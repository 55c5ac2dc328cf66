"""Pretrained backbones for images, from directories."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from toolkit.bundled import load_task
from toolkit.pretrained import build_pretrained_model, with_pretrained_backbone

pytest.importorskip("transformers")

from transformers import ResNetConfig, ResNetModel, ViTConfig, ViTModel

VIT = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 8, "patch_size": 4, "num_channels": 1,
}  # fmt: skip


def saved_vit(directory: Path, **settings: Any) -> str:
    torch.manual_seed(3)
    ViTModel(ViTConfig(**VIT)).save_pretrained(directory)
    if settings:
        (directory / "preprocessor_config.json").write_text(json.dumps(settings))
    return str(directory)


def test_that_features_are_the_mean_of_the_models_states(tmp_path: Path) -> None:
    name = saved_vit(tmp_path, image_mean=[0.25], image_std=[0.5])
    model = build_pretrained_model(name, (1, 8, 8), {"h1": 3, "h2": 4}, seed=0)
    assert model.training
    images = torch.rand(5, 1, 8, 8)
    with torch.no_grad():
        states = ViTModel.from_pretrained(name)(pixel_values=(images - 0.25) / 0.5)
        features = states.last_hidden_state.mean(dim=1)
        logits = model(images)
    for head, number in (("h1", 3), ("h2", 4)):
        assert logits[head].shape == (5, number)
        assert torch.allclose(logits[head], model.heads[head](features), atol=1e-6)


def test_that_what_features_do_not_depend_on_is_frozen(tmp_path: Path) -> None:
    model = build_pretrained_model(saved_vit(tmp_path), (1, 8, 8), {"h1": 3}, seed=0)
    frozen = {name for name, p in model.backbone.named_parameters() if not p.requires_grad}
    assert frozen == {"model.pooler.dense.weight", "model.pooler.dense.bias"}
    assert all(parameter.grad is None for parameter in model.parameters())
    model(torch.rand(2, 1, 8, 8))["h1"].sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (not parameter.requires_grad), name


def test_that_jobs_of_a_seed_begin_alike(tmp_path: Path) -> None:
    task = with_pretrained_backbone(load_task("digits"), saved_vit(tmp_path))
    first = task.build_model({"h1": 10, "h2": 5}, seed=4).state_dict()
    torch.manual_seed(99)
    second = task.build_model({"h2": 5}, seed=4).state_dict()
    assert set(first) - set(second) == {"heads.h1.weight", "heads.h1.bias"}
    assert all(torch.equal(first[name], tensor) for name, tensor in second.items())


def test_that_a_convolutional_one_keeps_its_statistics(tmp_path: Path) -> None:
    config = ResNetConfig(
        num_channels=3, embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic"
    )
    ResNetModel(config).save_pretrained(tmp_path)
    model = build_pretrained_model(str(tmp_path), (3, 32, 32), {"h1": 3}, seed=0)
    assert model(torch.rand(2, 3, 32, 32))["h1"].shape == (2, 3)
    fresh = build_pretrained_model(str(tmp_path), (3, 32, 32), {"h1": 3}, seed=0)
    for name, buffer in fresh.named_buffers():
        if name.endswith("running_mean"):
            assert not buffer.any(), "building has run it in training mode"


@pytest.mark.parametrize(
    ("settings", "shape", "message"),
    [
        ({}, (3, 8, 8), r"takes no images of shape \(3, 8, 8\).*Give the --image_shape C H W"),
        (
            {"image_mean": [0.5] * 3},
            (1, 8, 8),
            "3 channels, and these have 1: give --image_shape 3",
        ),
    ],
)
def test_that_other_images_are_refused(
    tmp_path: Path, settings: dict[str, Any], shape: tuple[int, int, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build_pretrained_model(saved_vit(tmp_path, **settings), shape, {"h1": 3}, seed=0)


def test_that_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"--model_name_or_path {tmp_path}: "):
        build_pretrained_model(str(tmp_path), (1, 8, 8), {"h1": 3}, seed=0)


def test_that_texts_are_refused() -> None:
    with pytest.raises(ValueError, match="'text' has texts"):
        with_pretrained_backbone(load_task("text"), "anything")
