"""The picture of predictions that a job of two ranks leaves, its model sharded or not."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.launching import Launcher
from tests.recipes.running import DONOR, RECEIVER, ROOT, TIMEOUT, Recipes
from tests.recipes.test_fsdp2 import CONFIG, SHARDING
from toolkit.bundled import load_task
from toolkit.pictures import LOOKED_AT, draw_predictions

NUM_STEPS = 2


def recorded(recipes: Recipes, role: str) -> NDArray[np.uint8]:
    """The one picture of a job, from its TensorBoard file."""
    curves = EventAccumulator(str(recipes.path("0001", role))).Reload()
    assert curves.Tags()["images"] == ["validation/predictions"]
    (event,) = curves.Images("validation/predictions")
    assert event.step == NUM_STEPS
    return np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))


@torch.no_grad()
def expected(recipes: Recipes, role: str, heads: list[str]) -> NDArray[np.uint8]:
    """What the whole model of a job's ``model.safetensors`` says of the same images."""
    task = load_task("digits")
    model = task.build_model(task.classes_of(heads), seed=0).double().eval()
    model.load_state_dict(recipes.weights("0001", role))
    rows = task.evaluation[list(range(LOOKED_AT))]
    answers = {h: a.argmax(dim=-1) for h, a in model(rows["inputs"].double(), heads).items()}
    labels = {head: rows[head] for head in heads}
    names = task.class_names_of(heads)
    return np.asarray(draw_predictions(rows["inputs"], labels, answers, names))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sharded", "whole"),
    [(DONOR, RECEIVER), (RECEIVER, DONOR)],
    ids=["donor sharded", "receiver sharded"],
)
def test_that_two_ranks_picture_what_the_whole_model_says(
    recipes: Recipes, launcher: Launcher, sharded: str, whole: str
) -> None:
    flags = {DONOR: [], RECEIVER: ["--max_train_steps", NUM_STEPS]}
    jobs = [
        recipes(whole, *flags[whole], num_processes=2),
        launcher(
            SHARDING, ROOT / sharded, "--dtype", "float64", *flags[sharded], num_processes=2,
            cwd=recipes.cwd, config=CONFIG,
        ),
    ]  # fmt: skip
    for job in jobs:
        job.wait(TIMEOUT)
    for role, heads in (("donor", ["h2"]), ("receiver", ["h1", "h2"])):
        assert recipes.results("0001", role)["num_processes"] == 2
        np.testing.assert_array_equal(recorded(recipes, role), expected(recipes, role, heads))
