"""What a file system gives, measured in a directory of its own that is deleted afterwards."""

from __future__ import annotations

import errno
import itertools
import mmap
import os
import re
import stat
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import get_args

from toolkit.bridge import files
from toolkit.bridge.transport import DirectoryTransport
from toolkit.doctor.peer import LAST, STREAM, Exclusive, Peer, race
from toolkit.doctor.report import Costs, Place, Promises, Times

SMALL_BYTES = 4096
PROBE_BYTES = 4 * 2**20  # written first, to know how much can be written in the time
MAX_TRIES = 300
NUM_NAMES = 25  # that two processes race for
MOUNTS = Path("/proc/mounts")


def find_place(directory: Path) -> Place:
    """What can be known without writing."""
    space, mode = os.statvfs(directory), directory.stat().st_mode
    mount = _mount_of(directory.resolve())
    return Place(
        file_system=mount[1] if mount else None,
        mount_point=mount[0] if mount else None,
        mount_options=mount[2].split(",") if mount else [],
        free_bytes=space.f_bavail * space.f_frsize,
        free_inodes=space.f_favail if space.f_files else None,
        max_name_bytes=space.f_namemax,
        mode=f"{stat.S_IMODE(mode):o}",
        others_may_write=bool(mode & stat.S_IWOTH),
        group_may_write=bool(mode & stat.S_IWGRP),
    )


def _mount_of(directory: Path) -> tuple[str, str, str] | None:
    """Mount point, type and options of the innermost mount that holds a directory."""
    try:
        lines = MOUNTS.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return None
    found = None
    for line in lines:
        _, point, kind, options, *_ = line.split(" ")
        # Blanks and the like are written as octal numbers.
        point = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), point)
        is_inner = found is None or len(point) >= len(found[0])  # of two at one point the later
        if is_inner and (directory == Path(point) or Path(point) in directory.parents):
            found = point, kind, options
    return found


def try_promises(root: Path, peer: Peer, seconds: float) -> Promises:
    """Try what the bridge relies on.

    Args:
        root: a directory that nothing else uses.
        peer: a second process in it.
        seconds: for all of it, about.
    """
    source = root / "source"
    content = os.urandom(SMALL_BYTES)
    source.write_bytes(content)
    hard_links = _can_link(source, root / "source-again")
    exclusive = {
        kind: _only_one_wins(kind, root, peer, source, seconds / 4)
        for kind in get_args(Exclusive)
        if hard_links or kind != "link"
    }
    part = slice(SMALL_BYTES // 3, SMALL_BYTES // 2)
    with source.open("rb") as file:
        read = os.pread(file.fileno(), part.stop - part.start, part.start)
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            seen = mapped[part]
    return Promises(
        hard_links=hard_links,
        link_never_replaces=exclusive.get("link"),
        create_is_exclusive=exclusive["create"],
        mkdir_is_exclusive=exclusive["mkdir"],
        rename_is_atomic=_replaces_whole(root, peer, seconds / 4),
        pread_is_right=read == content[part],
        mmap_is_right=seen == content[part],
    )


def _can_link(source: Path, target: Path) -> bool:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        return False
    return source.samefile(target)


def _only_one_wins(kind: Exclusive, root: Path, peer: Peer, source: Path, seconds: float) -> bool:
    """Whether of two processes that make the same new names exactly one makes each."""
    peer.tell("race", kind, source.name, seconds, NUM_NAMES)
    mine = race(kind, root, source, seconds, NUM_NAMES)
    theirs = peer.answer()
    pairs = itertools.zip_longest(mine, theirs, fillvalue=False)
    return all(one != other for one, other in pairs)


def _replaces_whole(root: Path, peer: Peer, seconds: float) -> bool:
    """Whether a file that is replaced, as heartbeats are, is whole whenever it is read."""
    path, deadline = root / "replaced", time.monotonic() + seconds
    path.write_bytes(b"0" * SMALL_BYTES)
    peer.tell("watch", path.name)
    for number in range(MAX_TRIES):
        files.replace(path, str(number % 10).encode() * SMALL_BYTES * (1 + number % 3))
        if time.monotonic() > deadline:
            break
    files.replace(path, LAST)
    num_reads, num_torn = peer.answer()
    return num_reads > 0 and num_torn == 0


def measure_costs(
    root: Path, peer: Peer | None, seconds: float, payload_bytes: int, stage: Callable[[str], None]
) -> Costs:
    """Measure what things cost.

    Args:
        root: a directory that nothing else uses.
        peer: a second process in it; None where nothing can be published.
        seconds: for all of it, about.
        payload_bytes: of the large file, at most.
        stage: told what is measured now.
    """
    part = seconds / 4
    stage("syncing small files")
    syncs = list(_sync_small(root, part))
    publish = visibility = None
    if peer is not None:
        transport = DirectoryTransport(root)
        transport.open_stream(STREAM)
        stage("publishing records")
        publish = Times.of(list(_publish(transport, part)))
        stage("seeing new names from another process")
        seen = list(_see(transport, peer, part))
        visibility = None if None in seen else Times.of([time for time in seen if time is not None])
    stage("writing and reading a large file")
    size, write_seconds, read_seconds = _write_and_read(root / "large", part, payload_bytes)
    return Costs(
        fsync_file=Times.of([file for file, _ in syncs]),
        fsync_directory=Times.of([directory for _, directory in syncs]),
        publish=publish,
        visibility=visibility,
        written_bytes=size,
        write_bytes_per_second=size / write_seconds,
        read_bytes_per_second=size / read_seconds,
        clock_skew=statistics.median(_clock_skews(root)),
    )


def _within(seconds: float) -> Iterator[int]:
    """Numbers of tries, one at least, as long as there is time."""
    deadline = time.monotonic() + seconds
    for number in range(MAX_TRIES):
        if number and time.monotonic() > deadline:
            return
        yield number


def _timed(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _sync_small(root: Path, seconds: float) -> Iterator[tuple[float, float]]:
    """Seconds for the sync of a new file, and of the directory with its name."""
    for number in _within(seconds):
        path = root / f"small-{number}"
        path.write_bytes(bytes(SMALL_BYTES))
        yield _timed(lambda: files.fsync_path(path)), _timed(lambda: files.fsync_path(root))  # noqa: B023


def _publish(transport: DirectoryTransport, seconds: float) -> Iterator[float]:
    def write(path: Path) -> None:
        path.write_bytes(bytes(SMALL_BYTES))

    for number in _within(seconds):
        yield _timed(lambda: transport.publish(STREAM, number, write))  # noqa: B023


def _see(transport: DirectoryTransport, peer: Peer, seconds: float) -> Iterator[float | None]:
    """Seconds until the peer sees a new name; its word comes through a pipe, so no clock is read
    but this one. None, and no more, if it does not see it.
    """
    source = transport.root / "source"
    for number in _within(seconds):
        path = transport.path(STREAM, MAX_TRIES + number)
        peer.tell("see", str(path.relative_to(transport.root)))
        start = time.perf_counter()
        os.link(source, path)
        if not peer.answer():
            yield None
            return
        yield time.perf_counter() - start


def _write_and_read(path: Path, seconds: float, max_bytes: int) -> tuple[int, float, float]:
    """Bytes written, and the seconds that it took to write and sync, and to read them."""
    block = os.urandom(PROBE_BYTES)  # some file systems compress

    def write(size: int) -> None:
        with path.open("wb") as file:
            for start in range(0, size, len(block)):
                file.write(block[: size - start])
            file.flush()
            os.fsync(file.fileno())

    def read() -> None:
        with path.open("rb", buffering=0) as file:
            while file.read(len(block)):
                pass

    probe = min(PROBE_BYTES, max_bytes)
    probe_seconds = _timed(lambda: write(probe))
    size = min(max_bytes, max(probe, int(probe * seconds / 2 / probe_seconds)))
    write_seconds = _timed(lambda: write(size))
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return size, write_seconds, _timed(read)


def _clock_skews(root: Path) -> Iterator[float]:
    for number in range(5):
        path = root / f"now-{number}"
        before = time.time()
        path.touch()
        after = time.time()
        yield path.stat().st_mtime - (before + after) / 2
