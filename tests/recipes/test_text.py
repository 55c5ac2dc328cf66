"""Donor, receiver and joint training of a transformer on text: the same recipes, as exact."""

from __future__ import annotations

import pytest

from tests.oracle import largest_difference
from tests.recipes.running import DONOR, JOINT, RECEIVER, TIMEOUT, Recipes

pytest.importorskip("transformers")
pytestmark = pytest.mark.slow


def test_that_text_on_two_ranks_equals_joint_training(recipes: Recipes) -> None:
    text = ["--task", "text"]
    own = ["--max_train_steps", 8, "--per_device_train_batch_size", 7, "--lr_head1", 1e-2]
    jobs = [
        recipes(DONOR, *text, "--per_device_train_batch_size", 9),
        recipes(RECEIVER, *text, *own, num_processes=2),
    ]
    for job in jobs:
        job.wait(TIMEOUT)
    results = recipes.results("0001", "receiver")
    assert (results["num_processes"], results["fates"]["applied"]) == (2, 8)
    sizes = ["--receiver_processes", 2, "--donor_batch_size", 9]
    recipes(JOINT, *text, *own, *sizes, "--output_dir", recipes.path("joint")).wait(TIMEOUT)
    joint = recipes.weights("joint")
    assert "backbone.transformer.embeddings.word_embeddings.weight" in joint
    assert largest_difference(recipes.weights("0001", "receiver"), joint) <= 1e-12
