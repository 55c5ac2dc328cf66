"""What users may rely on does not change by accident."""

from __future__ import annotations

import subprocess
import sys

import toolkit
from tests.launching import ROOT
from tests.public_api import snapshot
from toolkit.bridge import errors


def test_that_names_signatures_and_flags_are_as_recorded() -> None:
    recorded = (ROOT / "tests" / "public_api.txt").read_text()

    assert snapshot() == recorded, "meant? python -m tests.public_api > tests/public_api.txt"


def test_that_every_error_of_the_bridge_can_be_caught_by_name() -> None:
    raised = {name for name, item in vars(errors).items() if isinstance(item, type)}

    assert raised <= set(toolkit.__all__)


def test_that_all_public_names_can_be_imported_and_are_listed() -> None:
    code = "import toolkit; print(set(dir(toolkit)) >= {*toolkit.__all__}); from toolkit import *"
    code += "; print(all(name in globals() for name in toolkit.__all__))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)

    assert (done.stdout.split(), done.stderr) == (["True", "True"], "")
