"""Donor, receiver and joint training of a pretrained backbone on images in files, as exact."""

from __future__ import annotations

from pathlib import Path

import pytest
from datasets import Dataset
from sklearn.datasets import load_digits

from tests.oracle import largest_difference
from tests.recipes.running import DONOR, JOINT, RECEIVER, TIMEOUT, Recipes

pytest.importorskip("transformers")

from transformers import ViTConfig, ViTModel

pytestmark = pytest.mark.slow


def test_that_a_pretrained_backbone_equals_joint_training(recipes: Recipes, tmp_path: Path) -> None:
    config = ViTConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        image_size=8, patch_size=4, num_channels=1,
    )  # fmt: skip
    ViTModel(config).save_pretrained(tmp_path / "vit")
    bunch = load_digits()
    paths = {}
    for head, rows, divisor in (("h1", slice(0, 60), 1), ("h2", slice(60, 200), 2)):
        images = bunch.images[rows].astype("uint8").tolist()
        labels = (bunch.target[rows] // divisor).tolist()
        silo = Dataset.from_dict({"image": images, "label": labels})
        paths[head] = tmp_path / f"{head}.parquet"
        silo.to_parquet(paths[head])
    both = ["--model_name_or_path", tmp_path / "vit", "--num_classes", 10, 5]
    own = ["--max_train_steps", 6, "--per_device_train_batch_size", 7, "--lr_head1", 1e-2]
    jobs = [
        recipes(DONOR, *both, "--dataset_name", paths["h2"], "--per_device_train_batch_size", 9),
        recipes(RECEIVER, *both, *own, "--dataset_name", paths["h1"], num_processes=2),
    ]
    for job in jobs:
        job.wait(TIMEOUT)
    results = recipes.results("0001", "receiver")
    assert (results["num_processes"], results["fates"]["applied"]) == (2, 6)
    data = ["--dataset_name", paths["h1"], "--donor_dataset_name", paths["h2"]]
    sizes = ["--receiver_processes", 2, "--donor_batch_size", 9]
    joint = ["--output_dir", recipes.path("joint")]
    recipes(JOINT, *both, *own, *data, *sizes, *joint).wait(TIMEOUT)
    weights = recipes.weights("joint")
    assert "backbone.model.embeddings.cls_token" in weights
    assert largest_difference(recipes.weights("0001", "receiver"), weights) <= 1e-12
