"""One donor publishes, the four ranks of a receiver read along: real processes, real files.

The donor publishes through its ``PayloadOutbox``, which prunes what is acknowledged, and is at most
``WINDOW`` payloads ahead. Each reader reads every number once, in order, and now and then again one
that may be pruned at this moment. The first reader acknowledges what all have read.

Every publish waits for the disk twice (fsync): with ``--basetemp=/dev/shm/...`` this takes minutes,
on a busy disk the better part of an hour.
"""

from __future__ import annotations

import dataclasses
import functools
import multiprocessing
import os
import random
import time
from collections.abc import Callable
from multiprocessing.queues import Queue
from pathlib import Path

import pytest
import torch

from toolkit.bridge.config import BridgeConfig
from toolkit.bridge.errors import PayloadError
from toolkit.bridge.payload import Header, Record, check_identity, parse_record
from toolkit.bridge.payload_outbox import PayloadOutbox
from toolkit.bridge.polling import pause
from toolkit.bridge.publisher import Publisher
from toolkit.bridge.transport import DirectoryTransport
from toolkit.bridge.weights_inbox import WeightsInbox

NUM_READERS = 4
WINDOW = 32  # payloads that the donor may be ahead of what is acknowledged
PATIENCE = 60.0  # seconds without anything new: then something was lost
LIMIT = 2**16  # bytes of a record


@dataclasses.dataclass
class Seen:
    """What one reader has seen."""

    reader: int
    num_read: int = 0
    num_looks: int = 0  # of which the number was not there yet
    num_again: int = 0  # read once more, while it may be pruned
    num_pruned: int = 0  # of these, gone
    torn: list[str] = dataclasses.field(default_factory=list)
    lost: list[int] = dataclasses.field(default_factory=list)


def content(sequence: int) -> torch.Tensor:
    return torch.full((16 + sequence % 7,), float(sequence), dtype=torch.float64)


def read(transport: DirectoryTransport, sequence: int) -> Record:
    record = parse_record(transport.read("donor", sequence, max_bytes=LIMIT))
    check_identity(record.header, run_id="run", job="donor", sequence=sequence)
    if not torch.equal(record.tensors["w"], content(sequence)):
        raise PayloadError("digest", f"number {sequence} has another content")
    return record


def write(root: Path, total: int) -> None:
    """The donor's process."""
    transport = DirectoryTransport(root)
    publisher = Publisher(transport, "donor", "run", LIMIT)
    inbox = WeightsInbox("donor", transport, functools.partial(read, transport), is_resumed=False)
    config = BridgeConfig(payload_budget_files=WINDOW)
    outbox = PayloadOutbox(transport, publisher, inbox, config)
    for sequence in range(total):
        start = time.monotonic()
        while sequence - transport.acknowledged("donor") >= WINDOW:
            assert time.monotonic() < start + PATIENCE, f"nothing is acknowledged below {sequence}"
            pause(time.monotonic() - start)
        header = Header(
            kind="gradient", run_id="run", job="donor", attempt=1, receiver_step=sequence,
            weights_digest=f"weights-{sequence}", head="heads.h2", count=4.0,
        )  # fmt: skip
        outbox.publish(header, {"w": content(sequence)})
        assert publisher.next_sequence == sequence + 1


def follow(root: Path, reader: int, total: int, positions: list[int], out: Queue[Seen]) -> None:
    """A reader's process."""
    transport, seen, rng = DirectoryTransport(root), Seen(reader), random.Random(reader)
    news, acknowledged = time.monotonic(), 0

    def attempt(sequence: int) -> bool:
        """Whether a number is there; notes it if it is there in part."""
        try:
            read(transport, sequence)
        except FileNotFoundError:
            return False
        except PayloadError as error:
            seen.torn.append(str(error))
        return True

    while seen.num_read < total and time.monotonic() < news + PATIENCE and not seen.lost:
        cursor = seen.num_read
        if attempt(cursor):
            news = time.monotonic()
            seen.num_read = positions[reader] = cursor + 1
        else:
            seen.num_looks += 1
            later = [number for number in transport.sequences("donor") if number > cursor]
            if later and not attempt(cursor):
                seen.lost.append(cursor)
            pause(time.monotonic() - news)
        if reader == 0 and (lowest := min(positions)) > acknowledged:
            transport.acknowledge("donor", acknowledged := lowest)
        if rng.random() < 0.1:
            seen.num_again += 1
            seen.num_pruned += not attempt(max(0, cursor - rng.randrange(WINDOW)))
    while reader == 0 and acknowledged < total and time.monotonic() < news + PATIENCE:
        time.sleep(0.001)
        transport.acknowledge("donor", acknowledged := min(positions))
    out.put(seen)


@pytest.mark.faults
@pytest.mark.timeout(7200)
def test_that_100_000_payloads_reach_four_readers_whole_and_in_order(tmp_path: Path) -> None:
    run(tmp_path, int(os.environ.get("NUM_PUBLISHES", 100_000)))


def run(root: Path, total: int) -> None:
    context = multiprocessing.get_context("spawn")
    positions = context.Array("q", NUM_READERS)
    out: Queue[Seen] = context.Queue()
    DirectoryTransport(root).open_stream("donor")
    starts: list[tuple[Callable[..., None], tuple[object, ...]]] = [
        (follow, (root, reader, total, positions, out)) for reader in range(NUM_READERS)
    ]
    starts.append((write, (root, total)))
    start = time.monotonic()
    processes = [context.Process(target=target, args=args) for target, args in starts]
    for process in processes:
        process.start()
    try:
        seen = [out.get(timeout=7000) for _ in range(NUM_READERS)]
        for process in processes:
            process.join(PATIENCE)
    finally:
        for process in processes:
            process.kill()
    seconds = time.monotonic() - start
    print(f"{total} publishes in {seconds:.0f} s ({1e3 * seconds / total:.2f} ms each)")
    for reader in sorted(seen, key=lambda seen: seen.reader):
        print(reader)
        assert reader.torn == []
        assert reader.lost == []
        assert reader.num_read == total
        assert reader.num_pruned, "nothing was pruned while it was read: this shows nothing"
    assert [process.exitcode for process in processes] == [0] * len(processes)
    left = DirectoryTransport(root).sequences("donor")
    assert len(left) <= WINDOW + 1, "it was not pruned"
    assert left[-1] == total - 1
