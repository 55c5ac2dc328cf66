"""What a real browser shows of a run: that charts, values and pictures are there to be seen."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launching import Launcher
from tests.recipes.browser import CHROMIUM, Page, chromium, tensorboard
from tests.recipes.running import DONOR, RECEIVER, TIMEOUT, Recipes, wait_until
from toolkit.dashboard import BRIDGE_CHARTS, CATEGORY

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium in PATH"),
]

DONATED, STEPS = 20, 30
# By chart, in order, the colours of the lines that are drawn.
LINES = """all(document).filter((e) => e.tagName === 'VZ-LINE-CHART2').map((chart) => [...new Set(
    all(chart.shadowRoot)
    .filter((e) => e.tagName === 'path' && e.getAttribute('d') && e.getBoundingClientRect().width)
    .map((e) => getComputedStyle(e).stroke).filter((stroke) => stroke.startsWith('rgb')))])"""
PICTURES = """all(document).filter((e) => e.tagName === 'IMG' && e.src.includes('individualImage'))
    .map((e) => e.naturalWidth * e.naturalHeight)"""


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recipes]:
    """A run whose donor ends early, so that a teacher takes its place."""
    directory = tmp_path_factory.mktemp("run")
    with Launcher(directory) as launcher:
        recipes = Recipes(launcher, directory)
        flags = ["--eval_steps", 5]
        jobs = [
            recipes(RECEIVER, *flags, "--max_train_steps", STEPS),
            recipes(DONOR, *flags, "--max_train_steps", DONATED),
        ]
        for job in jobs:
            job.wait(TIMEOUT)
        yield recipes


@pytest.fixture(scope="module")
def board(recipes: Recipes, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with tensorboard(recipes.path(), tmp_path_factory.mktemp("board")) as address:
        yield address


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Page]:
    with chromium(tmp_path) as page:
        yield page


def shows(page: Page, number: float) -> bool:
    """Whether a table has this number, to the digits that TensorBoard gives."""
    texts = [text for text in page.texts() if re.fullmatch(r"\d+\.\d{2,}", text)]
    return any(abs(float(text) - number) < 0.01 for text in texts)


def test_that_the_charts_have_lines_of_both_jobs(page: Page, board: str) -> None:
    page.open(f"{board}/#custom_scalars")
    page.wait_for_texts(CATEGORY, *BRIDGE_CHARTS, "0001/donor", "0001/receiver")
    of_both = [2, 2, 1, 1, 2, 1, 2]  # staleness, cosine and fates are the receiver's
    wait_until(lambda: [len(found) for found in page.ask(LINES)] == of_both, "lines of both jobs")
    assert len({colour for found in page.ask(LINES) for colour in found}) == 2


def test_that_scalars_have_units_in_few_groups(page: Page, board: str) -> None:
    page.open(f"{board}/#timeseries")
    page.wait_for_texts(
        *("accuracy", "bridge", "events", "fates", "gradient", "loss", "train", "validation"),
        *("/h1 [%]", "/h2 [%]"),
    )


def test_the_hyperparameters_that_differ_and_the_last_values(
    page: Page, board: str, recipes: Recipes
) -> None:
    page.open(f"{board}/#hparams")
    page.wait_for_texts("max_train_steps", "accuracy/h1 [%]", "accuracy/h2 [%]")
    accuracies = recipes.results("0001", "receiver")["accuracies (%)"]
    assert accuracies.keys() == {"h1", "h2"}
    for value in (STEPS, DONATED, *accuracies.values()):
        wait_until(functools.partial(shows, page, value), f"{value} on the page")


def test_the_texts(page: Page, board: str) -> None:
    page.open(f"{board}/#text")
    page.wait_for_texts(
        *("per_device_train_batch_size", "the receiver publishes", "heads.h2.weight"),
        *("donor present (0 or 1)", "teacher heads.h2 (0 or 1)"),
    )


def test_the_pictures(page: Page, board: str) -> None:
    page.open(f"{board}/#images")
    page.wait_for_texts("validation/predictions")
    wait_until(lambda: [size > 0 for size in page.ask(PICTURES)] == [True, True], "two pictures")
