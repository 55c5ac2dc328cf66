"""One of two processes that hand tensors to each other; ``peer_job.py receiver|donor SETTINGS``.

A round: the receiver hands its weights over, and the donor, once it has them all, a gradient of as
many parameters. All ways take turns in both processes, so that a busy machine slows them alike.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch
from tqdm import tqdm

from toolkit.benchmarks.bridge.flower import Flower
from toolkit.benchmarks.bridge.own_ways import Behind, Bridge
from toolkit.benchmarks.bridge.ways import (
    AllReduce,
    AsyncCheckpoint,
    RawFile,
    Renamed,
    Saved,
    SendReceive,
    Side,
    Synced,
    Tensors,
    Way,
    num_bytes_of,
    other,
)

_ALL: tuple[type[Way], ...] = (
    RawFile, Bridge, Behind, Saved, Renamed, Synced, AsyncCheckpoint, Flower, SendReceive,
    AllReduce,
)  # fmt: skip
WAYS = {way.title: way for way in _ALL}

NUM_TENSORS = 20
WARM_UP = 2  # rounds, in which what arrives is compared


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PeerSettings:
    """What both processes do.

    Attributes:
        directory: new, on the disk that is measured.
        num_parameters: in float32, that cross each way.
        ways: titles.
        repeats: rounds of each way.
    """

    directory: str
    num_parameters: int
    ways: list[str]
    repeats: int


def random_tensors(side: Side, num_parameters: int) -> Tensors:
    """What a side sends."""
    generator = torch.Generator().manual_seed(("receiver", "donor").index(side))
    size = max(1, num_parameters // NUM_TENSORS)
    return {f"layer{index}": torch.randn(size, generator=generator) for index in range(NUM_TENSORS)}


def hand_over(way: Way, number: int) -> tuple[Tensors, float]:
    """One round; what has arrived, and the seconds for which a loop would have been kept.

    That is by sending, and by taking what is there; where that cannot be told from waiting, by
    both.
    """
    received: Tensors = {}
    stall = 0.0
    for is_sending in (way.side == "receiver", way.side == "donor"):
        if not is_sending:
            way.wait(number)
        start = time.perf_counter()
        if is_sending:
            way.send(number)
        else:
            received = way.receive(number)
        stall += time.perf_counter() - start
    return received, stall


def measure(side: Side, settings: PeerSettings) -> dict[str, object]:
    """All rounds; by way, seconds of a round, those of a stall, and torn files."""
    ours = random_tensors(side, settings.num_parameters)
    theirs = random_tensors(other(side), settings.num_parameters)
    seconds: dict[str, list[float]] = defaultdict(list)
    stalls: dict[str, list[float]] = defaultdict(list)
    with contextlib.ExitStack() as stack:
        ways = []
        for index, title in enumerate(settings.ways):
            directory = Path(settings.directory, f"way-{index}")
            directory.mkdir(exist_ok=True)
            way = WAYS[title](directory, side, ours)
            stack.callback(way.close)
            ways.append(way)
        for number in tqdm(range(WARM_UP + settings.repeats), disable=side == "donor"):
            for way in ways:
                start = time.perf_counter()
                received, stall = hand_over(way, number)
                if number < WARM_UP:
                    if not way.is_right(received, theirs):
                        raise ValueError(f"{way.title}: other tensors arrived than were sent")
                else:
                    seconds[way.title].append(time.perf_counter() - start)
                    stalls[way.title].append(stall)
    torn = {way.title: way.num_torn for way in ways}
    return {"num_bytes": num_bytes_of(ours), "seconds": seconds, "stalls": stalls, "torn": torn}


def main() -> None:
    """Measure as one side."""
    torch.set_num_threads(1)
    side: Side = "receiver" if sys.argv[1] == "receiver" else "donor"
    settings = PeerSettings(**json.loads(sys.argv[2]))
    found = measure(side, settings)
    Path(settings.directory, f"{side}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
