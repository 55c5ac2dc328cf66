"""What an installed distribution carries, and the launcher configurations."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser

import toolkit

ROOT = Path(__file__).resolve().parent.parent.parent
CONFIGS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))
NAMES = {"cpu_2proc", "fsdp2", "multi_gpu", "multi_node", "single_gpu"}

# `accelerate launch` treats these by themselves; it takes all others from the file only where its
# own default is None, and ignores them in silence where it is not (`same_network`, for one).
TREATED_APART = {"compute_environment", "distributed_type", "mixed_precision"}

each_config = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)


def test_that_every_mode_has_a_configuration() -> None:
    assert {path.stem for path in CONFIGS} == NAMES


@each_config
def test_that_accelerate_takes_the_configuration(path: Path) -> None:
    config = load_config_from_file(str(path))

    assert config.mixed_precision == "no"
    assert config.num_processes >= 1


@each_config
def test_that_the_launcher_heeds_every_field(path: Path) -> None:
    fields = yaml.safe_load(path.read_text())
    parser = launch_command_parser()

    ignored = {
        name for name in fields.keys() - TREATED_APART if parser.get_default(name) is not None
    }
    assert not ignored
    known = {action.dest for action in parser._actions}
    assert set(fields.get("fsdp_config", {})) <= known


@each_config
def test_that_every_field_carries_a_comment(path: Path) -> None:
    lines = path.read_text().splitlines()

    bare = [line for line in lines if line.strip() and not re.search(r"(^| )# \S", line)]
    assert not bare


def test_that_the_installed_version_is_the_packages() -> None:
    try:
        installed = importlib.metadata.version("gradient-bridge")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("gradient-bridge is not installed")

    assert installed == toolkit.__version__, "install again: the metadata is of another version"


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a source distribution, and the wheel that was built from it."""
    pytest.importorskip("build")
    pytest.importorskip("hatchling")
    directory = tmp_path_factory.mktemp("distributions")
    source = directory / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "runs", "build", "dist"))
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", directory, source]
    run_quietly(*command, cwd=directory)
    return directory


def run_quietly(*command: object, cwd: Path) -> str:
    """What a command prints, outside of this checkout; fails with it."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_that_the_wheel_carries_recipes_and_configurations(distributions: Path) -> None:
    (wheel,) = distributions.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        carried = set(archive.namelist())

    expected = {"toolkit/py.typed"}
    for folder, pattern in (("recipes", "*.py"), ("accelerate_configs", "*")):
        files = {path.name for path in (ROOT / folder).glob(pattern)} - {"__pycache__"}
        assert files, f"nothing in {folder}"
        expected |= {f"toolkit/{folder}/{name}" for name in files}
    assert expected <= carried
    assert not [name for name in carried if "__pycache__" in name or name.startswith("tests/")]
    assert wheel.name.startswith(f"gradient_bridge-{toolkit.__version__}-")


@pytest.mark.slow
def test_that_the_source_distribution_carries_the_tests(distributions: Path) -> None:
    (source,) = distributions.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        carried = {name.partition("/")[2] for name in archive.getnames()}

    tests = {str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("*.py")}
    assert tests | {"LICENSE", "README.md", "pyproject.toml"} <= carried
    assert not [name for name in carried if "__pycache__" in name or name.startswith("runs/")]


@pytest.mark.slow
def test_that_a_package_index_would_take_both(distributions: Path) -> None:
    pytest.importorskip("twine")
    files = [*distributions.glob("*.whl"), *distributions.glob("*.tar.gz")]

    said = run_quietly(sys.executable, "-m", "twine", "check", "--strict", *files, cwd=ROOT)

    assert said.count("PASSED") == 2


# -- installed in an environment of its own --------------------------------------------------------


@pytest.fixture(scope="module")
def installed(distributions: Path) -> Path:
    """The commands of a new environment that has the wheel and what it depends on, no extras."""
    (wheel,) = distributions.glob("*.whl")
    environment = distributions / "environment"
    venv.create(environment, with_pip=True)
    commands = environment / "bin"
    run_quietly(commands / "python", "-m", "pip", "install", "--quiet", wheel, cwd=distributions)
    return commands


@pytest.mark.slow
@pytest.mark.timeout(1200)  # the fixture's, which may download torch
def test_that_the_wheel_works_without_extras(installed: Path, tmp_path: Path) -> None:
    run_quietly(installed / "python", "-m", "pip", "check", cwd=tmp_path)
    names = "toolkit, toolkit.freezing, toolkit.isolation, toolkit.rotograd"
    where = f"from toolkit import *; import {names}; print(toolkit.__file__)"
    place = run_quietly(installed / "python", "-c", where, cwd=tmp_path)
    assert Path(place.strip()).is_relative_to(installed.parent)
    for command in ("demo", "inspect", "verify", "doctor", "reasons"):
        assert command in run_quietly(installed / "gradient-bridge", "--help", cwd=tmp_path)
        assert run_quietly(installed / "gradient-bridge", command, "--help", cwd=tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_that_the_installed_demo_compares_and_its_json_stays(
    installed: Path, tmp_path: Path
) -> None:
    demo = [installed / "gradient-bridge", "demo", "--json", "--max_train_steps", 4]

    found = json.loads(run_quietly(*demo, cwd=tmp_path))

    assert set(found) == {
        "format", "directory", "task", "dtype", "accuracies", "largest_differences", "seconds",
    }  # fmt: skip
    assert list(found["accuracies"]) == ["receiver alone", "bridge", "joint"]
    for accuracies in found["accuracies"].values():
        assert [len(by_seed) for by_seed in accuracies.values()] == [1, 1]
    assert found["accuracies"]["bridge"] == found["accuracies"]["joint"]
    assert found["largest_differences"][0] <= 1e-12
    assert (Path(found["directory"]) / "seed-0" / "receiver" / "results.json").is_file()


TYPED_SCRIPT = """
import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from typing_extensions import assert_type

from toolkit import BridgeConfig, GradientDonor, GradientReceiver
from toolkit.freezing import Freezing, freeze
from toolkit.isolation import CutPoint
from toolkit.rotograd import RotoGrad

def train(accelerator: Accelerator, model: torch.nn.Module, optimizer: torch.optim.Optimizer,
          loss: torch.Tensor) -> None:
    receiver = GradientReceiver(accelerator, model, optimizer, BridgeConfig(max_staleness=2))
    receiver.backward(loss, num_samples=3)
    assert_type(receiver.commit(), bool)
    assert_type(receiver.metrics, dict[str, float])
    assert_type(GradientDonor(accelerator, model, optimizer).publish(), bool)
    assert_type(freeze(model, optimizer=optimizer), Freezing)
    assert_type(CutPoint(loss, model).detached, torch.Tensor)
    assert_type(RotoGrad(model, [model], 4).completed_steps, int)
    receiver.comit()
    BridgeConfig(exchange="gradients")
"""


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_that_a_type_checker_sees_the_types(installed: Path, tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    (tmp_path / "script.py").write_text(TYPED_SCRIPT)
    python = ["--python-executable", installed / "python"]
    check = [sys.executable, "-m", "mypy", "--strict", "--no-color-output", *python, "script.py"]

    found = subprocess.run(
        [str(word) for word in check], cwd=tmp_path, capture_output=True, text=True
    ).stdout

    *errors, summary = found.splitlines()
    assert '"GradientReceiver" has no attribute "comit"' in errors[0]
    assert 'Argument "exchange" to "BridgeConfig" has incompatible type' in errors[1]
    assert summary.startswith("Found 2 errors"), found
