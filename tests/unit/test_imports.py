"""What is imported with what: the parts that take long to import only where they are needed."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.launching import ROOT


def modules_after(code: str) -> set[str]:
    """The modules that a fresh interpreter has imported after some code."""
    code = f"import sys; {code}; print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return set(done.stderr.split())


@pytest.mark.parametrize(
    ("code", "here", "missing"),
    [
        ("import toolkit.cli; toolkit.cli.build_parser().format_help()", "argparse", "torch"),
        (
            "from toolkit import BridgeConfig, GradientDonor, GradientReceiver",
            "accelerate",
            "torch.distributed.fsdp torch.distributed.tensor datasets sklearn transformers peft",
        ),
        ("import toolkit.arguments", "toolkit.bundled", "sklearn torch.distributed.fsdp"),
    ],
    ids=["--help of the command", "the bridge", "--help of a recipe"],
)
def test_what_is_not_imported(code: str, here: str, missing: str) -> None:
    modules = modules_after(code)
    assert here in modules
    assert not modules & {*missing.split()}
