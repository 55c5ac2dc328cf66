"""Streams of records in a directory."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.unit.streams import publish
from toolkit.bridge import files
from toolkit.bridge.errors import BridgeError
from toolkit.bridge.transport import DirectoryTransport

LIMIT = 1000


def records(transport: DirectoryTransport) -> list[str]:
    return sorted(os.listdir(transport.root / "donor" / "records"))


def test_that_opening_a_stream_makes_its_directories_and_leaves_no_probe(
    transport: DirectoryTransport,
) -> None:
    transport.open_stream("donor")

    assert sorted(os.listdir(transport.root / "donor")) == ["records", "rejected"]


def test_that_a_stream_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")

    with pytest.raises(BridgeError, match=r"cannot publish below .*that both jobs can write to"):
        DirectoryTransport(tmp_path / "file").open_stream("donor")


def test_that_a_killed_jobs_probe_is_in_nobodys_way(transport: DirectoryTransport) -> None:
    # in a container a job has the same process id at every start; a probe left by a kill
    # between its creation and its removal refuses every later start ("File exists").
    (transport.root / "donor" / f"probe-{os.getpid()}").write_bytes(b"")

    transport.open_stream("donor")


def test_that_what_a_killed_job_had_not_finished_is_deleted(transport: DirectoryTransport) -> None:
    # every kill left up to two files of a payload's size, beyond any budget
    publish(transport, 0)
    for name in (".tmp-abc-0000000001.safetensors", "alien"):
        (transport.root / "donor" / "records" / name).write_bytes(b"half")
    (transport.root / "donor" / "records" / ".tmp-directory").mkdir()

    transport.open_stream("donor")

    assert records(transport) == [".tmp-directory", "0000000000.safetensors", "alien"]


def test_that_a_published_record_is_read_back(transport: DirectoryTransport) -> None:
    assert publish(transport, 3, b"12345") == 5

    assert bytes(transport.read("donor", 3, max_bytes=5)) == b"12345"
    assert records(transport) == ["0000000003.safetensors"]


def test_that_a_number_is_published_once(transport: DirectoryTransport) -> None:
    publish(transport, 3, b"first")

    with pytest.raises(FileExistsError):
        publish(transport, 3, b"second")
    assert bytes(transport.read("donor", 3, max_bytes=LIMIT)) == b"first"
    assert records(transport) == ["0000000003.safetensors"]


def test_that_a_reader_may_move_a_record_aside_at_once(
    transport: DirectoryTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    # seen on a busy machine: the donor looked at its own torn record after it was rejected
    def reject_first(path: Path) -> None:
        if transport.sequences("donor"):
            monkeypatch.undo()
            transport.reject("donor", 0, "truncated", "")

    monkeypatch.setattr(files, "fsync_path", reject_first)
    assert transport.publish("donor", 0, lambda path: path.write_bytes(b"half")) == 4
    assert transport.rejection("donor", 0) == "truncated"


def test_that_the_streams_of_two_jobs_are_apart(transport: DirectoryTransport) -> None:
    transport.open_stream("receiver")
    publish(transport, 0)

    assert transport.sequences("receiver") == []
    with pytest.raises(FileNotFoundError):
        transport.read("receiver", 0, max_bytes=LIMIT)


def test_that_a_record_that_is_not_there_is_no_rejection(transport: DirectoryTransport) -> None:
    with pytest.raises(FileNotFoundError):
        transport.read("donor", 0, max_bytes=LIMIT)
    assert transport.sequences("nobody") == []
    assert transport.alien_names("nobody") == []


def test_that_numbers_are_listed_in_order(transport: DirectoryTransport) -> None:
    for sequence in (10, 2, 9_999_999_999, 0):
        publish(transport, sequence)

    assert transport.sequences("donor") == [0, 2, 10, 9_999_999_999]


def test_that_other_names_are_alien(transport: DirectoryTransport) -> None:
    publish(transport, 0)
    aliens = ["1.safetensors", "00000000001.safetensors", "0000000001.safetensors~", "README"]
    being_written = [".tmp-abc-0000000001.safetensors"]
    for name in aliens + being_written:
        (transport.root / "donor" / "records" / name).write_bytes(b"")

    assert transport.alien_names("donor") == sorted(aliens)
    assert transport.sequences("donor") == [0]


def test_that_only_ascii_digits_make_a_record(transport: DirectoryTransport) -> None:
    # `\d` takes the digits of every script, and `path()` then names another file.
    name = "\u0660" * 9 + "\u0661.safetensors"
    (transport.root / "donor" / "records" / name).write_bytes(b"")

    assert transport.sequences("donor") == []
    assert transport.alien_names("donor") == [name]


def test_that_an_acknowledgement_is_a_number_and_0_at_first(transport: DirectoryTransport) -> None:
    assert transport.acknowledged("donor") == 0
    transport.acknowledge("donor", 12)
    assert transport.acknowledged("donor") == 12
    (transport.root / "donor" / "acknowledged").write_bytes(b"")  # as after a power cut
    assert transport.acknowledged("donor") == 0


def test_that_pruning_deletes_what_is_below_a_number(transport: DirectoryTransport) -> None:
    for sequence in range(6):
        publish(transport, sequence)
    transport.prune("donor", 0)
    assert transport.sequences("donor") == [0, 1, 2, 3, 4, 5]

    transport.prune("donor", 4)
    transport.prune("donor", 4)

    assert transport.sequences("donor") == [4, 5]


def test_that_what_cannot_be_deleted_is_said_once_and_left(
    transport: DirectoryTransport, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for sequence in range(4):
        publish(transport, sequence)

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        transport.prune("donor", 2)
        transport.prune("donor", 3)
    assert caplog.text.count("cannot be deleted") == 1
    assert len(records(transport)) == 4

    transport.prune("donor", 3)
    assert len(records(transport)) == 1


@pytest.mark.parametrize("below", [5, 6, 1000])
def test_that_pruning_never_deletes_the_newest(transport: DirectoryTransport, below: int) -> None:
    for sequence in range(6):
        publish(transport, sequence)

    transport.prune("donor", below)

    assert transport.sequences("donor")[-1] == 5


def test_that_pruning_leaves_aliens_and_notes_alone(transport: DirectoryTransport) -> None:
    for sequence in range(3):
        publish(transport, sequence)
    transport.reject("donor", 0, "digest", "")
    (transport.root / "donor" / "records" / "README").write_bytes(b"")

    transport.prune("donor", 2)

    assert records(transport) == ["0000000002.safetensors", "README"]
    assert transport.rejection("donor", 0) == "digest"


def test_that_a_rejected_record_is_kept_aside_with_a_note(transport: DirectoryTransport) -> None:
    publish(transport, 0, b"bad")
    publish(transport, 1, b"good")
    assert transport.rejection("donor", 0) is None

    transport.reject("donor", 0, "digest", "the detail")

    aside = transport.root / "donor" / "rejected"
    assert transport.sequences("donor") == [1]
    assert (aside / "0000000000.safetensors").read_bytes() == b"bad"
    note = json.loads((aside / "0000000000.json").read_bytes())
    assert note == {"reason": "digest", "detail": "the detail"}
    assert transport.rejection("donor", 0) == "digest"
    assert transport.rejection("donor", 1) is None


def test_that_the_first_reason_stands(transport: DirectoryTransport) -> None:
    publish(transport, 0)
    transport.reject("donor", 0, "digest", "")
    transport.reject("donor", 0, "schema", "")

    assert transport.rejection("donor", 0) == "digest"


def test_that_a_missing_record_can_be_rejected(transport: DirectoryTransport) -> None:
    transport.reject("donor", 5, "missing", "")

    assert transport.rejection("donor", 5) == "missing"


def test_that_a_note_is_there_once_the_record_is_gone(
    transport: DirectoryTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the record is moved first. A receiver killed in between leaves a donor that hears of no
    # rejection, and nobody who can tell a lost number from one that is still to come.
    publish(transport, 0)

    class Killed(BaseException):
        pass

    def kill(source: object, target: object) -> None:
        raise Killed

    monkeypatch.setattr(os, "link", kill)
    with pytest.raises(Killed):
        transport.reject("donor", 0, "digest", "")

    assert records(transport) == ["0000000000.safetensors"] or transport.rejection("donor", 0)


def test_that_a_heartbeat_is_text_to_compare(transport: DirectoryTransport) -> None:
    assert transport.heartbeat("donor") == ""
    transport.beat("donor", 1)
    first = transport.heartbeat("donor")
    transport.beat("donor", 2)

    assert first != transport.heartbeat("donor") != ""


def test_that_a_kept_record_outlives_pruning(transport: DirectoryTransport) -> None:
    for sequence in range(3):
        publish(transport, sequence, b"12345")
    transport.keep("donor", 1)
    transport.keep("donor", 1)  # once more, after a resume
    transport.prune("donor", 2)

    assert transport.sequences("donor") == [2]
    assert transport.kept_path("donor", 1).read_bytes() == b"12345"
    assert os.listdir(transport.kept_path("donor", 1).parent) == ["0000000001.safetensors"]


def test_that_a_record_that_cannot_be_kept_is_an_error(transport: DirectoryTransport) -> None:
    with pytest.raises(BridgeError, match=r"cannot keep payload 7 as .*No such file"):
        transport.keep("donor", 7)
