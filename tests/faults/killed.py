"""A process that is killed between two of its changes to the disk, without the process."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from toolkit.bridge import payload
from toolkit.bridge.layout import write_file

# Of one publish: the record is written, made readable, synced; linked; its temporary name goes; the
# directory is synced.
NUM_CHANGES, LINK = 6, 3


class Killed(BaseException):
    """No ``except Exception`` of the dead process runs."""


@contextlib.contextmanager
def killed_after(num_changes: int) -> Iterator[None]:
    """The process dies before its next change; what it would do in ``finally`` does not happen.

    A record that is being written when it dies is left half written.
    """
    left = num_changes

    def bounded(change: Callable[..., Any], half: Callable[..., Any] | None = None) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal left
            if left <= 0:
                if left == 0 and half is not None:
                    half(*args, **options)
                left = -1
                raise Killed
            left -= 1
            return change(*args, **options)

        return call

    def write_half(path: Path, *content: Any) -> None:
        write_file(path, *content)
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])

    with contextlib.ExitStack() as stack:
        for owner, name in (
            (os, "fsync"), (os, "link"),
            (Path, "chmod"), (Path, "unlink"), (Path, "rename"), (Path, "replace"),
        ):  # fmt: skip
            stack.enter_context(mock.patch.object(owner, name, bounded(getattr(owner, name))))
        write = bounded(write_file, write_half)
        stack.enter_context(mock.patch.object(payload, "write_file", write))
        yield
