"""How the cost of a payload grows: with donors, with files that lie about, with ranks.

The receiver's side is the real one, in this process; donors are simulated: their payloads are
there before the receiver looks. With ranks, both jobs are launched.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.progress import Progress, track
from torch import Tensor

from toolkit.benchmarks.bridge.figures import Cell, Figures
from toolkit.benchmarks.bridge.lockstep import SMALL_BATCH
from toolkit.benchmarks.bridge.rounds import measure_pair, settings_of
from toolkit.bridge.config import BridgeConfig
from toolkit.bridge.donors import open_donors
from toolkit.bridge.inbox import Inbox
from toolkit.bridge.liveness import PeerWatch, Wait
from toolkit.bridge.payload import Header, Record, parse_record, write_record
from toolkit.bridge.publisher import Publisher
from toolkit.bridge.sentinel import Sentinel
from toolkit.bridge.transport import DirectoryTransport
from toolkit.launching import new_directory, terminable

RUN, HEAD, DONOR = "measured", "heads.h2", "donor"
NUM_DONORS = (1, 2, 4, 8, 16, 32)
NUM_FILES = (10, 100, 1_000, 10_000, 100_000)
NUM_RANKS = (1, 2, 4)
PAYLOAD_PARAMETERS = 100_000
WARM_UP = 3  # rounds


class SimulatedRun:
    """A run whose donors are simulated, and whose receiver is not.

    Args:
        root: a new directory; must exist.
        num_donors: that each publish one payload for every receiver step.
        num_parameters: of a payload, in float32.
    """

    def __init__(self, root: Path, num_donors: int, num_parameters: int) -> None:
        self.transport = DirectoryTransport(root)
        self._tensors = {"weight": torch.ones(num_parameters)}
        self._max_bytes = 4 * num_parameters + 2**20
        names = [f"{DONOR}-{number}" for number in range(num_donors)]
        self._publishers = [Publisher(self.transport, name, RUN, self._max_bytes) for name in names]
        self._donors = open_donors(
            self.transport,
            BridgeConfig(exchange="gradient", num_donors=num_donors),
            backbone=[],
            expected={HEAD: self._tensors},
            read=self._read,
            open_wait=lambda peer, what: Wait(peer, what, 60.0, True, "it is simulated"),
        )
        self._sum = {name: torch.zeros_like(tensor) for name, tensor in self._tensors.items()}
        self.step = 0
        self._donors.remember(0, "weights-0")

    def _read(self, donor: str, sequence: int) -> Record:
        return parse_record(self.transport.read(donor, sequence, max_bytes=self._max_bytes))

    def publish(self) -> None:
        """One payload of every donor, for this step; the ones before are deleted."""
        for publisher in self._publishers:
            publisher.publish(_header(self.step), self._tensors)
            publisher.prune(publisher.next_sequence)

    def take(self) -> dict[str, Tensor]:
        """What the receiver's main process does in a step; the sum of what was published."""
        self._donors.begin()
        while (verdicts := self._donors.look(self.step)) is None:
            pass
        for tensor in self._sum.values():
            tensor.zero_()
        for verdict in verdicts:
            record = self._donors.fetched(verdict)
            assert record is not None
            for name, tensor in record.tensors.items():
                self._sum[name] += tensor
        self._donors.settle(verdicts)
        self.step += 1
        self._donors.remember(self.step, f"weights-{self.step}")
        return self._sum


def _header(step: int) -> Header:
    return Header(
        kind="gradient", run_id=RUN, job=DONOR, attempt=1, receiver_step=step,
        weights_digest=f"weights-{step}", head=HEAD, count=1.0,
    )  # fmt: skip


def measure_donors(root: Path, num_donors: Sequence[int], repeats: int) -> Figures:
    """Take one payload of each donor.

    Args:
        root: on the disk that is measured.
        num_donors: to compare.
        repeats: steps of each.
    """
    torch.set_num_threads(1)
    runs = {num: SimulatedRun(new_directory(root, "donors"), num, PAYLOAD_PARAMETERS)
            for num in num_donors}  # fmt: skip
    seconds: dict[int, list[float]] = defaultdict(list)
    for repeat in track(range(-WARM_UP, repeats), "donors", transient=True):
        for num, run in runs.items():
            run.publish()
            start = time.perf_counter()
            run.take()
            if repeat >= 0:
                seconds[num].append(time.perf_counter() - start)
    each = {num: statistics.median(found) / num for num, found in seconds.items()}
    rows: list[dict[str, Cell]] = [
        {
            "donors": num,
            "step, ms": 1e3 * num * each[num],
            "a payload, ms": 1e3 * each[num],
            "/ fewest": each[num] / each[num_donors[0]],
        }
        for num in num_donors
    ]
    title = f"Taking payloads of {PAYLOAD_PARAMETERS / 1e6:g} M parameters, by number of donors"
    return Figures(title, rows, goals={"/ fewest": 1.25}, curves=[("donors", "a payload, ms", "")])


class CrowdedStream:
    """A stream in whose directories many files lie, of which the newest is a record.

    Args:
        root: a new directory; must exist.
        num_files: at least 1, that a donor has not deleted, and that were kept for good.
    """

    def __init__(self, root: Path, num_files: int) -> None:
        self.transport = DirectoryTransport(root)
        self.transport.open_stream(DONOR)
        self._tensors = {"weight": torch.ones(1000)}
        (root / DONOR / "kept").mkdir()
        for sequence in range(num_files - 1):
            self.transport.path(DONOR, sequence).touch()
            self.transport.kept_path(DONOR, sequence).touch()
        newest = dataclasses.replace(_header(0), sequence=num_files - 1)
        self.transport.publish(
            DONOR, num_files - 1, lambda path: write_record(path, newest, self._tensors)
        )
        self.transport.acknowledge(DONOR, num_files)
        self._publisher = Publisher(self.transport, DONOR, RUN, 2**20)
        self._step = 0
        self._digests: dict[int, str] = {}
        self._peer = PeerWatch(self.transport, DONOR)
        self._inbox = Inbox(
            DONOR, transport=self.transport, read=self._read, expected={HEAD: self._tensors},
            kind="gradient", unit="samples", sentinel=Sentinel(DONOR, []), max_staleness=0,
            digests=self._digests, is_new=True,
        )  # fmt: skip

    def _read(self, sequence: int) -> Record:
        return parse_record(self.transport.read(DONOR, sequence, max_bytes=2**20))

    def steps(self) -> dict[str, Callable[[], None]]:
        """What is measured, in this order; the last one is no part of a step in lockstep."""
        return {
            "poll": self._poll, "publish": self._publish, "take": self._take, "keep": self._keep,
            "list": self._list,
        }  # fmt: skip

    def _poll(self) -> None:
        """The receiver's look for a payload that is not there."""
        self._digests[self._step] = f"weights-{self._step}"
        assert self._inbox.look(self._step, self._peer) is None

    def _publish(self) -> None:
        """As a donor does while nothing more was acknowledged."""
        self.transport.acknowledged(DONOR)
        self._publisher.publish(_header(self._step), self._tensors)

    def _take(self) -> None:
        """The receiver's look for a payload that is there."""
        verdict = self._inbox.look(self._step, self._peer)
        assert verdict is not None
        assert verdict.digest
        self._inbox.settle(verdict)
        self._step += 1

    def _keep(self) -> None:
        """As with ``--keep_payloads``."""
        self.transport.keep(DONOR, self._publisher.next_sequence - 1)

    def _list(self) -> None:
        """Where something was acknowledged, and once a second of a long wait."""
        self.transport.sequences(DONOR)

    def clear(self) -> None:
        """Delete the record of this round."""
        for path in (self.transport.path, self.transport.kept_path):
            path(DONOR, self._publisher.next_sequence - 1).unlink()


def measure_files(root: Path, num_files: Sequence[int], repeats: int) -> Figures:
    """Publish, look for and take a payload beside many files.

    Args:
        root: on the disk that is measured.
        num_files: to compare.
        repeats: rounds of each.
    """
    seconds: dict[tuple[str, int], list[float]] = defaultdict(list)
    with (
        terminable(),
        tempfile.TemporaryDirectory(dir=root) as directory,
        Progress(transient=True) as progress,
    ):
        streams = {}
        for num in progress.track(num_files, description="making files"):
            (path := Path(directory, str(num))).mkdir()
            streams[num] = CrowdedStream(path, num)
        for repeat in progress.track(range(-WARM_UP, repeats), description="files"):
            for num, stream in streams.items():
                for what, step in stream.steps().items():
                    start = time.perf_counter()
                    step()
                    if repeat >= 0:
                        seconds[what, num].append(time.perf_counter() - start)
                stream.clear()
    medians = {key: statistics.median(found) for key, found in seconds.items()}
    rows: list[dict[str, Cell]] = []
    whats = dict.fromkeys(what for what, _ in medians)
    for what, num in itertools.product(whats, num_files):
        median = medians[what, num]
        row: dict[str, Cell] = {"what": what, "files": num, "ms": 1e3 * median}
        if what != "list":  # which no step in lockstep does
            row["/ fewest"] = median / medians[what, num_files[0]]
        rows.append(row)
    return Figures(
        "A payload beside many files",
        rows,
        goals={"/ fewest": 1.5},
        curves=[("files", "ms", "what")],
    )


def measure_ranks(
    root: Path, sizes: Sequence[float], num_ranks: Sequence[int], repeats: int
) -> Figures:
    """Rounds in lockstep with several ranks of the receiver.

    The plain steps that they are compared with reduce nothing between ranks: what several ranks
    add has the reduction of their own gradients in it.

    Args:
        root: on the disk that is measured.
        sizes: millions of parameters.
        num_ranks: to compare.
        repeats: rounds of each kind, about.
    """
    rows: list[dict[str, Cell]] = []
    for size in sizes:
        added: list[float] = []
        for ranks in num_ranks:
            config = {"exchange": "gradient"}
            settings = settings_of(root, "ranks", size, SMALL_BATCH, repeats, config)
            pair = measure_pair({"donor": settings, "receiver": settings}, ranks)
            added.append(pair.added)
            rows.append(
                {
                    "M": size,
                    "ranks": ranks,
                    "plain, ms": 1e3 * pair.plain,
                    "step, ms": 1e3 * pair.receiver.seconds["bridge"],
                    "added, ms": 1e3 * pair.added,
                    "/ raw": pair.added / pair.receiver.seconds["raw"],
                    "/ fewest": pair.added / added[0],
                }
            )
    return Figures("A round in lockstep, by ranks of the receiver", rows)
