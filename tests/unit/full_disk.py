"""Writes that fail in the middle of a real file, and what is synced."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Iterator


@contextlib.contextmanager
def no_file_above(num_bytes: int) -> Iterator[None]:
    """Writes beyond so many bytes of a file fail in the middle, as on a disk that gets full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def is_directory(descriptor: int) -> bool:
    """Whether what is synced by this descriptor is a directory."""
    return os.path.isdir(f"/proc/self/fd/{descriptor}")
