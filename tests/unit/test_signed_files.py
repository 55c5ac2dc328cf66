"""With a key, no file in a run's directory is believed that no job of this run has signed.

Without one and with one, none leads out of the directory or is read beyond its bound.
"""

from __future__ import annotations

import logging
import os
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.keys import KEY, NOT_THIS_RUNS, SIGNER
from tests.unit.streams import Bridge
from toolkit.bridge.authentication import UNSIGNED, Signer, warn_of_others
from toolkit.bridge.errors import BridgeError, PayloadError
from toolkit.bridge.liveness import Heartbeat, PeerWatch
from toolkit.bridge.own_weights import donors_with_weights
from toolkit.bridge.transport import DirectoryTransport


def opened(root: Path, signer: Signer = SIGNER) -> DirectoryTransport:
    root.mkdir(exist_ok=True)
    transport = DirectoryTransport(root, signer)
    transport.open_stream("donor")
    return transport


@pytest.fixture
def bridge(tmp_path: Path) -> Bridge:
    return Bridge(opened(tmp_path / "bridge"))


def test_a_donor_and_a_receiver_with_a_key(bridge: Bridge) -> None:
    for step in range(3):
        bridge.donate(at=step)
        assert bridge.take().digest
    assert bridge.fates() == {"applied": 3}


@pytest.mark.parametrize("signer", NOT_THIS_RUNS, ids=["no key", "other key", "other run"])
def test_that_a_forged_payload_is_rejected_and_the_next_one_taken(
    bridge: Bridge, tmp_path: Path, signer: Signer
) -> None:
    forger = Bridge(opened(tmp_path / "forged", signer))
    forger.donate(at=0)
    shutil.copy(forger.transport.path("donor", 0), bridge.transport.path("donor", 0))
    assert bridge.look() is None
    assert bridge.transport.rejection("donor", 0) == "unauthenticated"
    bridge.published = 1
    bridge.donate(at=0)

    assert bridge.take().sequence == 1
    assert bridge.fates() == {"rejected": 1, "applied": 1}


def test_that_a_payload_under_another_number_or_name_is_rejected(bridge: Bridge) -> None:
    transport = bridge.transport
    bridge.donate(at=0)
    bridge.take()
    shutil.copy(transport.path("donor", 0), transport.path("donor", 1))
    assert bridge.look() is None
    assert transport.rejection("donor", 1) == "alien"
    shutil.copy(transport.path("donor", 0), transport.path("donor", 2))
    for sequence, job in ((2, "donor"), (0, "receiver")):
        transport.open_stream(job)
        if job == "receiver":
            shutil.copy(transport.path("donor", 0), transport.path(job, 0))
        with pytest.raises(PayloadError, match="expected"):
            transport.read_header(job, sequence)


def forge_acknowledged(transport: DirectoryTransport) -> None:
    transport.acknowledge("donor", 9)


def forge_heartbeat(transport: DirectoryTransport) -> None:
    transport.beat("donor", 9)


def forge_note(transport: DirectoryTransport) -> None:
    transport.reject("donor", 9, "digest", "")


def seen(transport: DirectoryTransport) -> tuple[int, str, str | None, list[int]]:
    acknowledged, beat = transport.acknowledged("donor"), transport.heartbeat("donor")
    return acknowledged, beat, transport.rejection("donor", 9), transport.rejected("donor")


@pytest.mark.parametrize("forge", [forge_acknowledged, forge_heartbeat, forge_note])
def test_that_a_small_file_is_taken_from_this_run_only(
    tmp_path: Path,
    forge: Callable[[DirectoryTransport], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    nothing: tuple[int, str, str | None, list[int]] = (0, "", None, [])
    forge(opened(tmp_path / "own"))
    assert seen(opened(tmp_path / "own")) != nothing
    for number, signer in enumerate(NOT_THIS_RUNS):
        root = tmp_path / str(number)
        forge(opened(root, signer))
        transport = opened(root)
        caplog.clear()
        for _ in range(3):
            assert seen(transport) == nothing
        assert [record.levelno for record in caplog.records] == [logging.WARNING], "one warning"
        assert "is ignored: it " in caplog.text
        assert KEY.decode() not in caplog.text
    assert seen(opened(tmp_path / "own", UNSIGNED)) == nothing, "signed, and no key to tell by"


def test_that_the_signature_of_one_file_stands_for_no_other(tmp_path: Path) -> None:
    transport = opened(tmp_path)
    transport.open_stream("east")
    transport.beat("donor", 9)
    transport.reject("donor", 8, "digest", "")
    beat = tmp_path / "donor" / "heartbeat"
    shutil.copy(beat, tmp_path / "donor" / "acknowledged")
    shutil.copy(beat, tmp_path / "east" / "heartbeat")
    for job in ("donor", "east"):
        shutil.copy(
            tmp_path / "donor" / "rejected" / "0000000008.json",
            tmp_path / job / "rejected" / "0000000009.json",
        )

    assert transport.acknowledged("donor") == 0
    assert transport.heartbeat("east") == ""
    assert transport.rejected("donor") == [8]
    assert transport.rejected("east") == []


def test_that_a_replayed_counter_does_not_go_back(tmp_path: Path) -> None:
    transport, reader = opened(tmp_path), opened(tmp_path)
    transport.beat("donor", 4)
    transport.acknowledge("donor", 4)
    names = ("heartbeat", "acknowledged")
    old = {name: (tmp_path / "donor" / name).read_bytes() for name in names}
    transport.beat("donor", 5)
    transport.acknowledge("donor", 5)
    assert (reader.heartbeat("donor"), reader.acknowledged("donor")) == ("5", 5)
    for name in names:
        (tmp_path / "donor" / name).write_bytes(old[name])

    assert reader.heartbeat("donor") == "", "no change, and so no life"
    assert reader.acknowledged("donor") == 0, "nothing to delete"


def test_that_a_restart_beats_on_though_its_last_beat_is_gone(tmp_path: Path) -> None:
    transport = opened(tmp_path)
    transport.beat("donor", 5_000_000)
    watch = PeerWatch(opened(tmp_path), "donor")
    (tmp_path / "donor" / "heartbeat").unlink()
    heart = Heartbeat(transport, "donor", attempt=2)
    try:
        assert watch.await_life(20)
    finally:
        heart.stop()


def test_that_a_forged_note_is_in_nobodys_way(tmp_path: Path) -> None:
    forge_note(opened(tmp_path, UNSIGNED))
    transport = opened(tmp_path)
    transport.reject("donor", 9, "digest", "really")

    assert transport.rejection("donor", 9) == "digest"


# -- sizes, links, modes -----------------------------------------------------------------------

SMALL_FILES = ["heartbeat", "acknowledged", "rejected/0000000009.json"]


@pytest.mark.parametrize("signer", [UNSIGNED, SIGNER], ids=["no key", "key"])
@pytest.mark.parametrize("name", SMALL_FILES)
def test_that_no_small_file_is_read_beyond_its_bound(
    tmp_path: Path, name: str, signer: Signer
) -> None:
    transport = opened(tmp_path, signer)
    with (tmp_path / "donor" / name).open("wb") as file:
        file.truncate(64 * 2**20)  # takes no disk, but memory of who reads it
    tracemalloc.start()
    try:
        assert seen(transport)[:3] == (0, "", None)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.timeout(20)
@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
@pytest.mark.parametrize("name", SMALL_FILES)
def test_that_what_is_no_plain_file_is_not_there(
    tmp_path: Path, name: str, make: Callable[[Path], None]
) -> None:
    transport = opened(tmp_path)
    make(tmp_path / "donor" / name)

    assert seen(transport) == (0, "", None, [])
    transport.reject("donor", 9, "digest", "")  # must not fail for what is in its way


def test_that_no_small_file_is_read_through_a_link(tmp_path: Path) -> None:
    transport = opened(tmp_path)
    for forge in (forge_acknowledged, forge_heartbeat, forge_note):
        forge(transport)
    assert seen(transport) == (9, "9", "digest", [9])
    for name in SMALL_FILES:
        path = tmp_path / "donor" / name
        path.symlink_to(path.rename(path.with_name("elsewhere")))

    assert seen(transport) == (0, "", None, [])


@pytest.mark.parametrize("signer", [UNSIGNED, SIGNER], ids=["no key", "key"])
@pytest.mark.parametrize("name", ["donor", "donor/records"])
def test_that_no_link_leads_out_of_the_run(tmp_path: Path, name: str, signer: Signer) -> None:
    """A stream that lies elsewhere is not read, not listed, not written to and not deleted from."""
    elsewhere = Bridge(opened(tmp_path / "elsewhere", signer)).transport
    Bridge(elsewhere).donate(at=0)
    Bridge(elsewhere, published=1).donate(at=0)
    before = sorted((tmp_path / "elsewhere").rglob("*"))
    transport = DirectoryTransport(tmp_path / "bridge", signer)
    (tmp_path / "bridge" / name).parent.mkdir(parents=True)
    (tmp_path / "bridge" / name).symlink_to(tmp_path / "elsewhere" / name)

    assert (transport.streams(), transport.sequences("donor")) == ([], [])
    with pytest.raises(FileNotFoundError, match="outside of the run"):
        transport.read("donor", 0, max_bytes=10_000)
    transport.prune("donor", 5)
    transport.reject("donor", 0, "digest", "")
    transport.acknowledge("donor", 1)
    with pytest.raises(BridgeError, match="cannot publish"):
        transport.open_stream("donor")
    assert sorted((tmp_path / "elsewhere").rglob("*")) == before


def test_that_a_name_that_no_job_can_have_is_no_donor(tmp_path: Path) -> None:
    transport = opened(tmp_path)
    for name in ("donor.weights", "a\nb.weights", "-.weights", ".weights"):
        transport.open_stream(name)

    assert donors_with_weights(transport) == ["donor"]


@pytest.mark.parametrize("name", ["rejected", "kept"])
def test_that_nothing_is_put_aside_elsewhere(tmp_path: Path, name: str) -> None:
    bridge = Bridge(opened(tmp_path / "bridge"))
    bridge.donate(at=0)
    outside, inside = tmp_path / "outside", tmp_path / "bridge" / "donor" / name
    outside.mkdir()
    if inside.exists():
        inside.rmdir()
    inside.symlink_to(outside)

    if name == "kept":
        with pytest.raises(BridgeError, match="is outside of the run"):
            bridge.transport.keep("donor", 0)
    bridge.transport.reject("donor", 0, "digest", "")
    assert list(outside.iterdir()) == []


@pytest.mark.parametrize(
    ("mode", "warns"), [(0o777, True), (0o775, True), (0o1777, False), (0o755, False)]
)
def test_that_it_says_where_others_may_delete_runs(
    tmp_path: Path, mode: int, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    tmp_path.chmod(mode)
    warn_of_others(tmp_path)

    assert (f"mode {mode:04o}" in caplog.text) == warns == bool(caplog.records)
