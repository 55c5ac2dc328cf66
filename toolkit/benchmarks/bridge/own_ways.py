"""The hand-over by this package: as both jobs do it in lockstep, and beside their steps."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import Tensor

from toolkit.benchmarks.bridge.ways import Side, Tensors, Way, num_bytes_of, other
from toolkit.bridge.background import Background
from toolkit.bridge.payload import Header, Record, check_identity, parse_record
from toolkit.bridge.polling import pause
from toolkit.bridge.prefetch import Prefetch
from toolkit.bridge.publisher import Publisher
from toolkit.bridge.transport import DirectoryTransport

RUN = "measured"


class Bridge(Way):
    """Records of this package, published and read as both jobs do in lockstep."""

    title = "bridge"
    durable = "yes"

    def __init__(self, directory: Path, side: Side, tensors: Tensors) -> None:
        super().__init__(directory, side, tensors)
        self._transport = DirectoryTransport(directory)
        self._max_bytes = num_bytes_of(tensors) + 2**20
        self._publisher = Publisher(self._transport, side, RUN, self._max_bytes)

    def send(self, number: int) -> None:
        self._publish(number, self.tensors)

    def wait(self, number: int) -> None:
        start = time.monotonic()
        while not self._transport.path(other(self.side), number).exists():
            pause(time.monotonic() - start)

    def receive(self, number: int) -> Tensors:
        return self._read(other(self.side), number).tensors

    def _publish(self, number: int, tensors: Tensors) -> None:
        header = Header(
            kind="weights" if self.side == "receiver" else "gradient", run_id=RUN, job=self.side,
            attempt=1, receiver_step=number, weights_digest="", count=1.0,
        )  # fmt: skip
        self._publisher.publish_weights(header, tensors)

    def _read(self, sender: str, number: int) -> Record:
        record = parse_record(self._transport.read(sender, number, max_bytes=self._max_bytes))
        check_identity(record.header, run_id=RUN, job=sender, sequence=number)
        return record


class Behind(Bridge):
    """The same where no step waits for the other job: staged, written behind, read ahead."""

    title = "bridge, late"
    durable = "later"

    def __init__(self, directory: Path, side: Side, tensors: Tensors) -> None:
        super().__init__(directory, side, tensors)
        self._background = Background()
        self._staged: dict[str, Tensor] = {
            name: torch.empty_like(tensor) for name, tensor in tensors.items()
        }
        self._next = 0  # to be received
        self._num_read = 0
        self._prefetch = Prefetch(self._find, self._read)

    def send(self, number: int) -> None:
        self._finish()
        for name, tensor in self.tensors.items():
            self._staged[name].copy_(tensor)
        self._background.start(lambda: self._publish(number, self._staged))

    def wait(self, number: int) -> None:
        super().wait(number)
        start = time.monotonic()
        while number > 0 and self._num_read <= number:  # it reads ahead from the second one on
            pause(time.monotonic() - start)

    def receive(self, number: int) -> Tensors:
        tensors = self._prefetch.read(other(self.side), number).tensors
        self._next = number + 1
        return tensors

    def close(self) -> None:
        """End both threads; raises what has failed in writing."""
        self._prefetch.stop()
        self._finish()

    def _find(self) -> list[tuple[str, int]]:
        sender = other(self.side)
        is_there = self._transport.path(sender, self._next).exists()
        return [(sender, self._next)] if is_there else []

    def _read(self, sender: str, number: int) -> Record:
        try:
            return super()._read(sender, number)
        finally:  # who receives it raises what failed
            self._num_read = number + 1

    def _finish(self) -> None:
        """Wait for the write before; raises what has failed there."""
        while not self._background.join(1.0):
            pass
        self._background.check()
