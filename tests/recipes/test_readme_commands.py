"""Every command, flag and Python block of the README: what it names is there, and it runs."""

from __future__ import annotations

import argparse
import importlib
import json
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.launching import Launcher
from tests.public_api import RECIPES, recipe_parser
from tests.recipes.running import ROOT
from toolkit.cli import build_parser

README = (ROOT / "README.md").read_text()
BLOCK = re.compile(
    r"(?:<!-- (?P<mark>[\w: -]+) -->\n)?```(?P<language>\w*)\n(?P<code>.*?)```", re.S
)


def blocks(language: str) -> list[tuple[str, str]]:
    """The README's blocks of one language: the mark before each, and its text."""
    found = [match for match in BLOCK.finditer(README) if match["language"] == language]
    return [(match["mark"] or "", match["code"]) for match in found]


def spans() -> list[str]:
    """What stands between single backticks outside of blocks, on one line each."""
    text = BLOCK.sub("", README)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]


def parses(parse: Callable[[], object]) -> str:
    """Why a command line is refused, or an empty string."""
    try:
        parse()
    except SystemExit as end:
        return "" if end.code in (0, None) else f"status {end.code}"
    return ""


def check_command(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """That a command of this project would start: its file is there, its flags are known."""
    words = [word for word in shlex.split(command, comments=True) if word not in ("...", "&")]
    if words[0] == "gradient-bridge":
        assert not parses(lambda: build_parser().parse_args(words[1:])), command
        return
    if words[:2] == ["accelerate", "launch"]:
        words = words[2:]
        while words and not words[0].endswith(".py"):
            if words[0] == "--config_file" and words[1:]:
                assert (ROOT / words[1]).is_file(), command
            words = words[1:]
    else:
        assert words[0] == "python"
        words = words[1:]
    if not words:
        return
    if words[0] == "-m":
        assert importlib.util.find_spec(words[1]), command
        return
    assert (ROOT / words[0]).is_file(), command
    module = importlib.import_module(words[0].removesuffix(".py").replace("/", "."))
    monkeypatch.setattr(sys, "argv", words)
    assert not parses(module.parse_arguments), command


COMMANDS = ("accelerate launch", "gradient-bridge ", "python ")


def commands() -> Iterator[str]:
    """Every command of this project in the README."""
    for _, code in blocks("bash"):
        for line in code.splitlines():
            yield from (part.strip() for part in re.split(r"&&|;", line.split("  #")[0]))
    yield from spans()


@pytest.mark.parametrize("command", sorted({c for c in commands() if c.startswith(COMMANDS)}))
def test_that_a_command_would_start(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_command(command, monkeypatch)


def known_flags() -> dict[str, list[argparse.Action]]:
    """The flags of all recipes and commands."""
    parsers = [build_parser(), *map(recipe_parser, RECIPES)]
    flags: dict[str, list[argparse.Action]] = {}
    while parsers:
        for action in parsers.pop()._actions:
            if isinstance(action, argparse._SubParsersAction):
                parsers.extend(action.choices.values())
            for flag in action.option_strings:
                flags.setdefault(flag, []).append(action)
    return flags


OF_LAUNCH = {"--config_file", "--gpu_ids", "--main_process_port", "--mixed_precision"}


def test_that_every_flag_is_known() -> None:
    known = known_flags()
    assert len(known) > 80
    for span in spans():
        words = shlex.split(span) if span.startswith("--") else []
        for place, word in enumerate(words):
            if not word.startswith("--") or word in OF_LAUNCH:
                continue
            assert word in known, f"`{span}` is in the README"
            value = words[place + 1] if len(words) > place + 1 else ""
            choices = [c for action in known[word] for c in action.choices or ()]
            if value and not value.startswith("--") and choices:
                assert value in map(str, choices), f"`{span}` is in the README"


def test_that_paths_are_there() -> None:
    for span in spans():
        if re.fullmatch(r"(toolkit|recipes|tests|accelerate_configs)/[\w./]*", span):
            assert (ROOT / span).exists() or (ROOT / "tests" / span).exists(), span
    for path in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / path).exists(), path


LISTED = ("toolkit", "toolkit/bridge", "recipes", "accelerate_configs", "tests")
NOT_LISTED = ("__init__.py", "py.typed", "__pycache__")


def listed_files() -> dict[str, list[str]]:
    """By directory, the names in the README's table of files, each with words of its own."""
    (table,) = re.findall(r"^## Files\n.*?\n\|---\|---\|\n(.*?)\n\n", README, re.M | re.S)
    found: dict[str, list[str]] = {}
    directory = ""
    for row in table.splitlines():
        where, entries = re.fullmatch(r"\| (.+?) \| (.+) \|", row).groups()  # type: ignore[union-attr]
        if match := re.match(r"`([\w/]+)/`", where):
            directory = match[1]
        for entry in entries.split(" · "):
            name = re.fullmatch(r"`([\w./]+)` \S.*", entry)
            assert name, f"{entry!r} is no file and what it is for"
            found.setdefault(directory, []).append(name[1])
    return found


@pytest.mark.parametrize("directory", LISTED)
def test_that_every_file_is_named(directory: str) -> None:
    names = {
        path.name + "/" * path.is_dir()
        for path in (ROOT / directory).iterdir()
        if path.name not in NOT_LISTED and str(path.relative_to(ROOT)) not in LISTED
    }
    if directory == "tests":  # by its directories
        names = {name for name in names if name.endswith("/")}
    listed = listed_files()
    assert sorted(listed[directory]) == sorted(names)
    assert listed.keys() == set(LISTED)


SET_UP = ("pip install", "pre-commit install", "pytest", ".ci/run")  # .ci/run itself runs these


def test_that_no_block_is_left_out() -> None:
    marks = [mark for mark, _ in blocks("bash")]
    assert sorted(marks) == ["run: ci", "run: demo", "run: two jobs", "test-command"]
    assert not blocks("python"), "an example is in a docstring, see test_examples.py"


@pytest.mark.slow
@pytest.mark.parametrize("mark", ["run: demo", "run: two jobs"])
def test_that_a_block_runs(mark: str, launcher: Launcher, tmp_path: Path) -> None:
    for directory in ("recipes", "accelerate_configs"):
        (tmp_path / directory).symlink_to(ROOT / directory)
    (code,) = (code for found, code in blocks("bash") if found == mark)
    parts = [p.split("#")[0].strip() for line in code.splitlines() for p in line.split("&&")]
    started = [
        launcher.start(f"part-{number}", ["bash", "-c", part], cwd=tmp_path)
        for number, part in enumerate(parts)
        if not part.startswith(SET_UP)
    ]
    for job in started:
        job.wait(600)
    if mark == "run: demo":
        assert "joint" in started[0].output()
        return
    for role in ("donor", "receiver"):
        content = json.loads((tmp_path / "runs" / "0001" / role / "results.json").read_bytes())
        assert content["recipe"] == role
    assert content["fates"]["applied"] == content["completed_steps"], "none was alone"
