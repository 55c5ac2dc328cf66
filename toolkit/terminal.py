"""What the commands have in common on a terminal and in a pipe."""

from __future__ import annotations

import json
from typing import NoReturn

from rich.console import Console


class Output(Console):
    """Standard output; where nobody reads it any more, as after ``| head``, it says so."""

    def on_broken_pipe(self) -> NoReturn:
        """In place of an end with status 1, which has another meaning here.

        Raises:
            BrokenPipeError: the one that is being handled.
        """
        raise


def report_error(error: Exception, *, as_json: bool, **place: object) -> None:
    """Say why a command cannot do its work.

    Args:
        error: whose message says what is wrong, where, and what to do.
        as_json: whether standard output is to have it as an object too.
        place: what the command was asked about, fields of that object.
    """
    if as_json:
        print(json.dumps({**place, "error": str(error)}))
    console = Console(stderr=True)
    console.print(f"error: {error}", highlight=False, markup=False, soft_wrap=True)
