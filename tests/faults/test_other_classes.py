"""Two donors whose data sets have the same classes in another order, as launched jobs."""

from __future__ import annotations

from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, Features

from tests.launching import Launcher
from tests.recipes.running import DONOR, TIMEOUT, Recipes, wait_until

pytestmark = pytest.mark.faults

NAMES = {"east": ["cat", "dog", "horse"], "west": ["cat", "horse", "dog"]}


def test_that_the_second_donor_is_refused(launcher: Launcher, tmp_path: Path) -> None:
    recipes = Recipes(launcher, tmp_path)
    for name, names in NAMES.items():
        rows = Dataset.from_dict({"image": [[[0.5] * 8] * 8] * 9, "label": [0, 1, 2] * 3})
        features = Features({**rows.features, "label": ClassLabel(names=names)})
        rows.cast(features).save_to_disk(str(tmp_path / name))
    own = ["--num_classes", 10, 3, "--run", "mine"]
    first = recipes(DONOR, *own, "--donor_name", "east", "--dataset_name", "east")
    wait_until(recipes.path("mine", "bridge", "east", "heartbeat").exists, "the first donor")
    second = recipes(DONOR, *own, "--donor_name", "west", "--dataset_name", "west")
    assert second.wait(TIMEOUT, check=False) == 1
    error = second.output().partition("error: ")[2].splitlines()
    assert error[0].startswith("the classes of 'heads.h2' are not those of run mine, as the east")
    assert error[0].endswith("These differ:")
    assert error[1:3] == [
        "  class 1: west 'horse', east 'dog'",
        "  class 2: west 'dog', east 'horse'",
    ]
    assert "Traceback" not in second.output().partition("error: ")[0]
    assert first.is_running(), first.output()
