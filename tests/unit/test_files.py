"""Names appear once, with their whole content, and leave nothing beside them."""

from __future__ import annotations

import multiprocessing
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from toolkit.bridge import files

NUM_RACES = 30


def writer(content: bytes):  # type: ignore[no-untyped-def]
    return lambda path: path.write_bytes(content)


def names(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


def test_that_a_created_file_has_its_content_and_nothing_lies_beside_it(tmp_path: Path) -> None:
    files.create(tmp_path / "a", writer(b"content"))

    assert (tmp_path / "a").read_bytes() == b"content"
    assert (tmp_path / "a").stat().st_nlink == 1
    assert names(tmp_path) == ["a"]


def test_that_nothing_is_there_before_all_of_it_is_written(tmp_path: Path) -> None:
    def write(path: Path) -> None:
        path.write_bytes(b"half")
        assert not (tmp_path / "a").exists()
        assert path.parent == tmp_path, "a link needs the same file system"
        assert path.name.startswith(files.TEMPORARY_PREFIX)

    files.create(tmp_path / "a", write)
    assert names(tmp_path) == ["a"]


def test_that_create_never_replaces(tmp_path: Path) -> None:
    files.create(tmp_path / "a", writer(b"first"))

    with pytest.raises(FileExistsError):
        files.create(tmp_path / "a", writer(b"second"))
    assert (tmp_path / "a").read_bytes() == b"first"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("kind", ["directory", "dangling link"])
def test_that_create_replaces_no_other_kind_of_name(tmp_path: Path, kind: str) -> None:
    if kind == "directory":
        (tmp_path / "a").mkdir()
    else:
        (tmp_path / "a").symlink_to(tmp_path / "nowhere")

    with pytest.raises(FileExistsError):
        files.create(tmp_path / "a", writer(b"new"))
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("write_first", [b"", b"half"])
def test_that_a_failed_write_leaves_nothing(tmp_path: Path, write_first: bytes) -> None:
    def write(path: Path) -> None:
        if write_first:
            path.write_bytes(write_first)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        files.create(tmp_path / "a", write)
    assert names(tmp_path) == []


def test_that_a_writer_that_writes_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        files.create(tmp_path / "a", lambda path: None)
    assert names(tmp_path) == []


def test_that_create_needs_its_directory(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        files.create(tmp_path / "absent" / "a", writer(b"content"))


def test_that_one_of_many_racing_threads_wins(tmp_path: Path) -> None:
    num_threads = 4
    barrier = threading.Barrier(num_threads)

    def race(thread: int) -> list[int]:
        won = []
        for number in range(NUM_RACES):
            barrier.wait()
            try:
                files.create(tmp_path / str(number), writer(str(thread).encode()))
            except FileExistsError:
                continue
            won.append(number)
        return won

    with ThreadPoolExecutor(num_threads) as pool:
        wins = list(pool.map(race, range(num_threads)))

    assert sorted(number for won in wins for number in won) == list(range(NUM_RACES))
    for thread, won in enumerate(wins):
        assert all((tmp_path / str(number)).read_text() == str(thread) for number in won)
    assert len(names(tmp_path)) == NUM_RACES


def race_in_process(
    directory: Path, process: int, barrier: Barrier, results: Queue[tuple[int, list[int]]]
) -> None:
    won = []
    for number in range(NUM_RACES):
        barrier.wait()
        try:
            files.create(directory / str(number), writer(str(process).encode()))
        except FileExistsError:
            continue
        won.append(number)
    results.put((process, won))


def test_that_one_of_two_racing_processes_wins(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(2), context.Queue()
    processes = [
        context.Process(target=race_in_process, args=(tmp_path, process, barrier, results))
        for process in range(2)
    ]
    for process in processes:
        process.start()
    wins = dict(results.get(timeout=60) for _ in processes)
    for process in processes:
        process.join()

    assert sorted(wins[0] + wins[1]) == list(range(NUM_RACES))
    for number, won in wins.items():
        assert all((tmp_path / str(name)).read_text() == str(number) for name in won)
    assert len(names(tmp_path)) == NUM_RACES


def test_that_replace_makes_and_changes_a_file(tmp_path: Path) -> None:
    for content in (b"first", b"second, longer", b""):
        files.replace(tmp_path / "a", content)
        assert (tmp_path / "a").read_bytes() == content
        assert names(tmp_path) == ["a"]


def test_that_an_open_reader_keeps_the_old_content(tmp_path: Path) -> None:
    files.replace(tmp_path / "a", b"first")
    with (tmp_path / "a").open("rb") as file:
        files.replace(tmp_path / "a", b"other")
        assert file.read() == b"first"


def test_that_a_failed_replace_leaves_the_old_content_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()

    with pytest.raises(OSError, match="directory"):
        files.replace(tmp_path / "a", b"content")
    assert names(tmp_path) == ["a"]


def test_that_a_tree_is_synced_file_by_file(tmp_path: Path, synced: list[int]) -> None:
    root = tmp_path / "checkpoint"
    (root / "below").mkdir(parents=True)
    (root / "model").write_bytes(b"1")
    (root / "below" / "state").write_bytes(b"2")
    files.fsync_tree(root)

    paths = (tmp_path, root, root / "model", root / "below", root / "below" / "state")
    assert {*synced} == {path.stat().st_ino for path in paths}


def test_that_a_created_file_is_synced_before_it_appears(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = []
    fsync = os.fsync

    def note(descriptor: int) -> None:
        is_file = os.fstat(descriptor).st_ino != tmp_path.stat().st_ino
        events.append(("file" if is_file else "directory", (tmp_path / "a").exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    files.create(tmp_path / "a", writer(b"content"))

    assert events == [("file", False), ("directory", True)]


def test_that_a_link_is_a_second_name_of_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"content")
    files.link(tmp_path / "a", tmp_path / "b")

    assert (tmp_path / "a").samefile(tmp_path / "b")
    with pytest.raises(FileExistsError):
        files.link(tmp_path / "a", tmp_path / "b")
    with pytest.raises(FileNotFoundError):
        files.link(tmp_path / "absent", tmp_path / "c")
    (tmp_path / "a").unlink()
    assert (tmp_path / "b").read_bytes() == b"content"
    assert names(tmp_path) == ["b"]


def test_that_a_refused_link_becomes_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_bytes(b"content")
    link = os.link

    def refuse(source: Path, target: Path, **options: bool) -> None:
        if Path(source).name == "a":  # as the system does with another user's file
            raise PermissionError(1, "Operation not permitted")
        link(source, target, **options)

    monkeypatch.setattr(os, "link", refuse)
    files.link(tmp_path / "a", tmp_path / "b")

    assert not (tmp_path / "a").samefile(tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"content"
    assert names(tmp_path) == ["a", "b"]
