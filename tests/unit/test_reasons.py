"""The table of reasons holds every word that the code says, and no other."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

from tests.launching import ROOT
from toolkit import cli, demo, verify
from toolkit.bridge import inbox, reasons, sentinel
from toolkit.doctor import command as doctor
from toolkit.inspection import command as inspect
from toolkit.inspection import run
from toolkit.reasons import KINDS

SOURCES = sorted((ROOT / "toolkit").rglob("*.py"))


def first_arguments(*functions: str) -> Iterator[str]:
    """What the package calls these functions with, first, or as ``reason``."""
    for path in SOURCES:
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and getattr(call.func, "id", "") in functions:
                named = [word.value for word in call.keywords if word.arg == "reason"]
                yield from map(ast.unparse, named or call.args[:1])


def words_of(module: Any) -> set[object]:
    """All texts in a module's code."""
    tree = ast.parse(Path(module.__file__).read_text())
    return {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}


@pytest.mark.parametrize(
    ("kind", "table"),
    [
        (reasons.Rejection, reasons.REJECTIONS),
        (reasons.Drop, reasons.DROPS),
        (reasons.Alarm, reasons.ALARMS),
        (reasons.State, reasons.STATES),
        (reasons.ExitStatus, reasons.EXIT_STATUSES),
    ],
)
def test_that_every_word_is_explained(kind: Any, table: Any) -> None:
    assert list(get_args(kind)) == list(table)


def test_that_every_fate_is_explained() -> None:
    assert [*get_args(reasons.Fate), "pending"] == list(reasons.FATES)


def test_that_each_reason_to_reject_is_given_somewhere_and_no_other() -> None:
    given = {*first_arguments("PayloadError", "BadRecord")} - {"error.reason"}

    assert given == {repr(code) for code in reasons.REJECTIONS if code != reasons.UNKNOWN}


def test_that_each_reason_to_drop_is_given_somewhere_and_no_other() -> None:
    assert {*first_arguments("_dropped")} == {repr(code) for code in reasons.DROPS}


def test_that_the_other_words_are_said_where_they_belong() -> None:
    assert words_of(sentinel) >= set(reasons.ALARMS)
    assert words_of(run) >= set(reasons.STATES)
    assert words_of(inbox) >= set(get_args(reasons.Fate))


def test_that_commands_end_with_a_status_that_is_explained() -> None:
    ends = {
        *(demo.DONE, demo.FAILED, demo.UNUSABLE),
        *(verify.EQUAL, verify.DIFFERENT, verify.UNUSABLE),
        *(inspect.OK, inspect.WRONG, inspect.UNUSABLE),
        *(doctor.USABLE, doctor.UNUSABLE),
    }
    assert ends <= set(reasons.EXIT_STATUSES)


def test_that_figures_are_those_of_the_code() -> None:
    assert f"{sentinel.NORM_FACTOR:g} times" in reasons.ALARMS["norm"].meaning
    assert f"{sentinel.LOSS_FALL:.0%}" in reasons.ALARMS["flat loss"].meaning


def test_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")

    assert cli.main(["reasons"]) == 0
    shown = capsys.readouterr().out
    assert cli.main(["reasons", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["reasons"]

    lines = shown.splitlines()
    assert max(map(len, lines)) <= 80
    assert [row["code"] for row in rows] == [code for table in KINDS.values() for code in table]
    first_words = [line.split("  ")[0] for line in lines]
    assert [word for word in first_words if word in {str(row["code"]) for row in rows}] == [
        str(row["code"]) for row in rows
    ]
