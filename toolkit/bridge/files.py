"""Durable, atomic files: the only place that creates, replaces and syncs them.

``create`` makes a name that never existed appear with its whole content, or not at all, and
survive a power cut once it returns: temporary file in the same directory, write, fsync, hard link
to the final name, fsync of the directory. Who may not enter a directory may use nothing in it.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shutil
import stat
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np

from toolkit.bridge.errors import PayloadError

TEMPORARY_PREFIX = ".tmp-"
MAX_SMALL_BYTES = 16 * 2**20  # of a file that is read whole whatever is in it
_NO_PLAIN_FILE = (
    errno.ELOOP,
    errno.ENXIO,
    errno.ENOTDIR,
)  # a link, a socket, a path through a file


def fsync_path(path: Path) -> None:
    """Flush a file's content, or a directory's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(path: Path) -> None:
    """Make a directory and those above it, unless it is there.

    Raises:
        NotADirectoryError: if a symbolic link is in its place, which may lead anywhere.
    """
    if not path.parent.exists():
        make_directory(path.parent)
    with contextlib.suppress(FileExistsError):
        path.mkdir(path.parent.stat().st_mode & 0o777)
    if not stat.S_ISDIR(path.lstat().st_mode):
        raise NotADirectoryError(errno.ENOTDIR, "is no directory", str(path))


def restrict(path: Path) -> None:
    """Take from a file what those may not do who may not do it to its directory."""
    mode, allowed = path.stat().st_mode, path.parent.stat().st_mode
    if mode & 0o666 & ~allowed:
        path.chmod(mode & 0o666 & allowed)


def open_plain(path: Path) -> io.BufferedReader:
    """Open a plain file, and nothing that a symbolic link in its place leads to.

    Raises:
        OSError: if it cannot be opened.
        PayloadError: if it is no plain file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in _NO_PLAIN_FILE:
            raise PayloadError("not_a_file", f"{path.name}: {error.strerror}") from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise PayloadError("not_a_file", f"{path.name} is no plain file")
    return os.fdopen(descriptor, "rb")


def read_whole(file: io.BufferedReader, max_bytes: int) -> memoryview:
    """All of a file, unless it is too large; no more memory is taken than it has bytes.

    Returns:
        Writable memory, which nothing else uses.

    Raises:
        OSError: if it cannot be read.
        PayloadError: if it has more than ``max_bytes``.
    """
    size = os.fstat(file.fileno()).st_size
    if size > max_bytes:
        raise PayloadError("too_large", f"{size} bytes, at most {max_bytes} are expected")
    # Python's own writable memory is filled with zeros first, which takes as long as reading.
    content = memoryview(np.empty(size, np.uint8))  # type: ignore[arg-type]
    return content[: file.readinto(content)]


def read_plain(path: Path, max_bytes: int = MAX_SMALL_BYTES) -> bytes:
    """All of a plain file; raises as :func:`open_plain` and :func:`read_whole` do."""
    with open_plain(path) as file:
        return bytes(read_whole(file, max_bytes))


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
        restrict(temporary)
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


def replace(path: Path, content: bytes, directory_mode: int | None = None) -> None:
    """Give ``path`` a new content; a reader sees the old one or the new one, never a mixture.

    Not synced to the disk: for a state that is worth nothing after a power cut.

    Args:
        path: the file.
        content: that it has afterwards.
        directory_mode: of its directory, where that is known: those who may not use that may not
            use the file. Two names are looked up then, the temporary one and ``path``.
    """
    if directory_mode is None:
        directory_mode = path.parent.stat().st_mode
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}-{path.name}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    try:
        with open(os.open(temporary, flags, directory_mode & 0o666), "wb") as file:
            file.write(content)
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        raise
