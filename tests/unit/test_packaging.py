"""What an installed distribution carries, and the launcher configurations."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
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


@pytest.mark.slow
def test_that_the_wheel_carries_recipes_and_configurations(tmp_path: Path) -> None:
    pytest.importorskip("build")
    pytest.importorskip("hatchling")
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "runs", "build", "dist"))
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir"]
    built = subprocess.run(
        [*command, str(tmp_path / "dist"), str(source)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert built.returncode == 0, built.stdout

    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        carried = set(archive.namelist())

    expected = {"toolkit/py.typed"}
    for folder, suffix in (("recipes", ".py"), ("accelerate_configs", ".yaml")):
        files = {path.name for path in (ROOT / folder).glob(f"*{suffix}")}
        assert files, f"nothing in {folder}"
        expected |= {f"toolkit/{folder}/{name}" for name in files}
    assert expected <= carried
    assert not [name for name in carried if "__pycache__" in name or name.startswith("tests/")]
    assert wheel.name.startswith(f"gradient_bridge-{toolkit.__version__}-")
