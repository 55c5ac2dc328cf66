"""The examples in docstrings, which tests run as they stand there."""

from __future__ import annotations

import re
import textwrap
from types import ModuleType


def examples_of(module: ModuleType) -> list[str]:
    """The blocks of Python code in a module's docstring, as scripts."""
    blocks = re.findall(r"\.\. code-block:: python\n\n((?:    .*\n|\n)+)", module.__doc__ or "")
    return [textwrap.dedent(block).strip() + "\n" for block in blocks]
