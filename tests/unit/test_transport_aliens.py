"""What may lie in a record's place instead of a record."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.streams import publish
from toolkit.bridge.errors import PayloadError
from toolkit.bridge.transport import DirectoryTransport

LIMIT = 1000


def symlink(path: Path) -> None:
    target = path.with_name("README")
    target.write_bytes(b"content")
    path.symlink_to(target)


def dangling(path: Path) -> None:
    path.symlink_to(path.with_name("nowhere"))


def loop(path: Path) -> None:
    path.symlink_to(path)


def bind(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # the address of a socket is short
    try:
        with socket.socket(socket.AF_UNIX) as unix:
            unix.bind(path.name)
    finally:
        os.chdir(here)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "make",
    [
        symlink,
        dangling,
        loop,
        os.mkfifo,
        bind,
        # os.fdopen() of a directory raises IsADirectoryError before it is looked at, which
        # ends the reading job (and leaks the descriptor).
        os.mkdir,
    ],
)
def test_that_what_is_no_plain_file_is_rejected_at_once(
    transport: DirectoryTransport, make: Callable[[Path], object]
) -> None:
    make(transport.path("donor", 0))

    with pytest.raises(PayloadError) as caught:
        transport.read("donor", 0, max_bytes=LIMIT)
    assert caught.value.reason == "not_a_file"


def test_that_a_rejected_read_leaves_no_descriptor_open(transport: DirectoryTransport) -> None:
    os.mkfifo(transport.path("donor", 0))
    publish(transport, 1, bytes(LIMIT + 1))
    before = len(os.listdir("/proc/self/fd"))
    for sequence in (0, 1):
        with pytest.raises(PayloadError):
            transport.read("donor", sequence, max_bytes=LIMIT)

    assert len(os.listdir("/proc/self/fd")) == before


def test_that_an_empty_file_is_read_as_it_is(transport: DirectoryTransport) -> None:
    publish(transport, 0, b"")

    assert bytes(transport.read("donor", 0, max_bytes=LIMIT)) == b""


def test_that_a_file_that_is_too_large_is_not_read(transport: DirectoryTransport) -> None:
    publish(transport, 0, bytes(LIMIT))
    publish(transport, 1, bytes(LIMIT + 1))
    assert len(transport.read("donor", 0, max_bytes=LIMIT)) == LIMIT

    with pytest.raises(PayloadError, match="1001 bytes, at most 1000") as caught:
        transport.read("donor", 1, max_bytes=LIMIT)
    assert caught.value.reason == "too_large"


def test_that_pruning_passes_over_a_directory(transport: DirectoryTransport) -> None:
    # unlink() of a directory with a record's name ends the donor (IsADirectoryError); it
    # becomes reachable once a reader rejects a directory instead of failing over it.
    os.mkdir(transport.path("donor", 0))
    for sequence in (1, 2):
        publish(transport, sequence)

    transport.prune("donor", 2)

    assert 1 not in transport.sequences("donor")


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, dangling])
def test_that_what_is_no_file_is_kept_aside_too(
    transport: DirectoryTransport, make: Callable[[Path], object]
) -> None:
    make(transport.path("donor", 0))

    transport.reject("donor", 0, "not_a_file", "")

    assert transport.sequences("donor") == []
    assert os.listdir(transport.root / "donor" / "rejected").count("0000000000.safetensors") == 1


def test_that_a_file_in_the_place_of_the_records_is_no_stream(
    transport: DirectoryTransport,
) -> None:
    # NotADirectoryError ended the receiver that looked for donors.
    (transport.root / "notes").mkdir()
    (transport.root / "notes" / "records").write_bytes(b"of last week")

    assert transport.streams() == ["donor"]


def test_that_a_record_is_refused_in_a_stream_that_a_stranger_made(
    transport: DirectoryTransport,
) -> None:
    # a copy of some records without what lies beside them: FileNotFoundError ended the receiver.
    (transport.root / "copy" / "records").mkdir(parents=True)
    transport.path("copy", 0).write_bytes(b"content")

    transport.reject("copy", 0, "alien", "")

    assert transport.rejection("copy", 0) == "alien"
    assert transport.sequences("copy") == []


def test_that_a_record_may_be_refused_where_it_cannot_be_put_aside(
    transport: DirectoryTransport,
) -> None:
    (transport.root / "copy" / "records").mkdir(parents=True)
    (transport.root / "copy" / "rejected").write_bytes(b"a file")
    transport.path("copy", 0).write_bytes(b"content")

    transport.reject("copy", 0, "alien", "")

    assert transport.rejection("copy", 0) is None
    assert transport.sequences("copy") == [0]


def test_that_a_second_directory_in_a_records_place_stays_there(
    transport: DirectoryTransport,
) -> None:
    # "Directory not empty" ended the reader.
    for _ in range(2):
        (transport.path("donor", 0) / "below").mkdir(parents=True)
        transport.reject("donor", 0, "not_a_file", "")

    assert transport.sequences("donor") == [0]
    assert transport.rejection("donor", 0) == "not_a_file"
