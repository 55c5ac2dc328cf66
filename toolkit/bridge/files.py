"""Durable, atomic files: the only place that creates, replaces and syncs them.

``create`` makes a name that never existed appear with its whole content, or not at all, and
survive a power cut once it returns: temporary file in the same directory, write, fsync, hard link
to the final name, fsync of the directory.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

TEMPORARY_PREFIX = ".tmp-"


def fsync_path(path: Path) -> None:
    """Flush a file's content, or a directory's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(root: Path) -> None:
    """Flush every plain file and directory below ``root``, and ``root``'s entry in its parent."""
    for directory, _, names in os.walk(root):
        for name in names:
            path = Path(directory, name)
            if path.is_file() and not path.is_symlink():
                fsync_path(path)
        fsync_path(Path(directory))
    fsync_path(root.parent)


def create(path: Path, write: Callable[[Path], object]) -> int:
    """Create ``path`` with what ``write(temporary_path)`` writes; never replace.

    Returns:
        Its size in bytes. A reader may have moved it away by then.

    Raises:
        FileExistsError: if the name exists already; its content is left alone.
    """
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}-{path.name}")
    try:
        write(temporary)
        fsync_path(temporary)
        size = temporary.stat().st_size
        try:
            os.link(temporary, path)
        except FileExistsError:
            # A network file system that repeats a request may refuse its own success.
            if not _is_same(path, temporary):
                raise
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
    fsync_path(path.parent)
    return size


def _is_same(path: Path, other: Path) -> bool:
    try:
        return path.samefile(other)
    except FileNotFoundError:  # what was in the way has been moved meanwhile
        return False


def link(source: Path, target: Path) -> None:
    """Give ``source`` a second name; durable when it returns. The bytes are not written again.

    Where the system refuses the link (the file of another user, say), ``target`` is a copy.

    Raises:
        FileExistsError: if the name exists already; its content is left alone.
        FileNotFoundError: if there is no ``source``.
    """
    try:
        os.link(source, target, follow_symlinks=False)
    except (FileExistsError, FileNotFoundError):
        raise
    except OSError:
        create(target, lambda temporary: shutil.copyfile(source, temporary))
    fsync_path(target.parent)


def replace(path: Path, content: bytes) -> None:
    """Give ``path`` a new content; a reader sees the old one or the new one, never a mixture.

    Not synced to the disk: for a state that is worth nothing after a power cut.
    """
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}-{path.name}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
