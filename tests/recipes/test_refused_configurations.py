"""What Accelerate would silently run as something else ends every recipe at once, with one line."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.recipes.running import ROOT
from tests.unit.jobs import reset

RECIPES = ["donor", "receiver", "joint", "adversarial", "alternating"]
WITH_DTYPE = ["donor", "receiver", "joint"]
PRECISION = "ACCELERATE_MIXED_PRECISION"  # as `accelerate launch` passes it on
FP16 = "mixed precision fp16 needs a GPU: on device cpu .* in fp32 without a word. Use bf16"
FLOAT64 = "--dtype float64 with mixed precision bf16: .* Give --mixed_precision no .*float32"
FSDP = r"FSDP is configured \(ACCELERATE_USE_FSDP=true\), but with 1 process.* train as NO"


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """Every recipe begins with a process-wide state of its own."""
    reset()
    yield
    reset()


@pytest.mark.parametrize(
    ("recipe", "flags", "variables", "message"),
    [
        pytest.param(recipe, flags.split(), variables, message, id=f"{recipe}, {name}")
        for name, recipes, flags, variables, message in (
            ("fp16", RECIPES, "--mixed_precision fp16", {}, FP16),
            ("launched with fp16", RECIPES, "", {PRECISION: "fp16"}, FP16),
            ("FSDP", RECIPES, "", {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, FSDP),
            ("bf16", WITH_DTYPE, "--dtype float64 --mixed_precision bf16", {}, FLOAT64),
            ("launched with bf16", WITH_DTYPE, "--dtype float64", {PRECISION: "bf16"}, FLOAT64),
        )
        for recipe in recipes
    ],
)
def test_that_a_recipe_refuses(
    recipe: str,
    flags: list[str],
    variables: dict[str, str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(sys, "argv", [recipe, *flags])
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match=f"^error: {message}"):
        runpy.run_path(str(ROOT / "recipes" / f"{recipe}.py"), run_name="__main__")
    assert not list(tmp_path.iterdir()), "it began before it looked"
