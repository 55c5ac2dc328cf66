"""Colours on a terminal only, and errors that a program can read too."""

from __future__ import annotations

import json
import os
import pty
import re
import sys
from pathlib import Path

import pytest

from tests.unit.run_files import Streams
from toolkit import cli, demo
from toolkit.launching import JobFailedError

ESCAPE = "\x1b["
COLOUR = re.compile(r"\x1b\[(\d+;)*(3[0-8]|4[0-8]|9[0-7]|10[0-7])(;\d+)*m")


@pytest.fixture
def damaged(tmp_path: Path) -> list[str]:
    """Looks at a run with something wrong, which is shown in red."""
    Streams(tmp_path / "0001").settle(1, 0, 2)
    return ["inspect", str(tmp_path / "0001"), "--seconds", "0.1"]


def on_a_terminal(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """What the command prints on a pseudo-terminal."""
    ours, its = pty.openpty()
    with os.fdopen(its, "w") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.setenv("COLUMNS", "80")
        assert cli.main(arguments) == 1
        monkeypatch.undo()
    shown = b""
    with os.fdopen(ours, "rb", buffering=0) as reader:
        while True:
            try:
                shown += reader.read(4096)
            except OSError:  # the other end is closed
                return shown.decode()


def test_that_a_terminal_has_colours(damaged: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)

    shown = on_a_terminal(damaged, monkeypatch)

    assert COLOUR.search(shown)
    assert "WRONG" in shown


def test_that_no_color_is_heeded(damaged: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")

    shown = on_a_terminal(damaged, monkeypatch)

    assert not COLOUR.search(shown)
    assert "WRONG" in shown


def test_that_a_pipe_has_no_escapes(damaged: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(damaged) == 1

    shown = capfd.readouterr()
    assert ESCAPE not in shown.out + shown.err
    assert "WRONG" in shown.out


def test_that_a_directory_that_cannot_be_used_is_an_error_with_a_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_text("")

    assert cli.main(["demo", "--json", "--runs_dir", str(file)]) == 2

    out, err = capsys.readouterr()
    assert f"cannot write in --runs_dir {file}" in err
    assert "give another one" in err
    assert json.loads(out)["error"] in err


def test_that_a_log_is_shown_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise JobFailedError("donor ended with status 1:\n[rank0] in [/tmp] [bold]")

    monkeypatch.setattr(demo, "train_one_seed", fail)

    assert cli.main(["demo", "--runs_dir", str(tmp_path)]) == 1

    assert "[rank0] in [/tmp] [bold]" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_that_a_pipe_that_nobody_reads_ends_the_command_in_silence(
    damaged: list[str], flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, its = os.pipe()
    os.close(ours)
    with os.fdopen(its, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)

        assert cli.main([*damaged, *flags]) == 141  # and not 1, which is about the run
