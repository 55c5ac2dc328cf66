"""Bandwidth of publishing and of reading a record, over raw files of the same bytes."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import torch

from toolkit.benchmarks.bridge.figures import Cell, Figures
from toolkit.benchmarks.timing import interleaved_medians
from toolkit.bridge.payload import Header, parse_record
from toolkit.bridge.publisher import Publisher
from toolkit.bridge.transport import DirectoryTransport

RUN, STREAM = "measured", "donor"
NUM_TENSORS = 20


class Streams:
    """The same tensors as records of a stream and as raw files.

    Args:
        root: a new directory on the disk that is measured; must exist.
        num_parameters: in float32.
    """

    def __init__(self, root: Path, num_parameters: int) -> None:
        torch.manual_seed(0)
        self._raw = root / "raw"
        self._transport = DirectoryTransport(root)
        size = num_parameters // NUM_TENSORS
        self._tensors = {f"layer{index}": torch.randn(size) for index in range(NUM_TENSORS)}
        self.num_bytes = 4 * size * NUM_TENSORS
        self._publisher = Publisher(self._transport, STREAM, RUN, 2 * self.num_bytes + 2**20)
        header = Header(
            kind="gradient", run_id=RUN, job=STREAM, attempt=1, receiver_step=0, weights_digest=""
        )
        self._header = dataclasses.replace(header, count=1.0)
        self._buffer = bytearray(self.num_bytes)
        self._directory = os.open(root, os.O_RDONLY)
        self.write_raw()
        self.publish()

    def write_raw(self) -> None:
        """Write and sync; the file of before is deleted, as old records are."""
        self._raw.unlink(missing_ok=True)
        with self._raw.open("xb", buffering=0) as file:
            for tensor in self._tensors.values():
                rest = memoryview(tensor.numpy()).cast("B")  # type: ignore[arg-type]
                while rest:
                    rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        os.fsync(self._directory)

    def publish(self) -> None:
        """Publish a record; the ones before it are deleted."""
        self._publisher.publish(self._header, self._tensors)
        self._publisher.prune(self._publisher.next_sequence)

    def read_raw(self) -> None:
        """Read the file into memory that is there."""
        with self._raw.open("rb", buffering=0) as file:
            rest = memoryview(self._buffer)
            while rest and (num_read := file.readinto(rest)):
                rest = rest[num_read:]

    def read(self) -> None:
        """Read and verify the newest record."""
        sequence = self._publisher.next_sequence - 1
        parse_record(self._transport.read(STREAM, sequence, max_bytes=2 * self.num_bytes + 2**20))


def measure_transport(roots: dict[str, Path], sizes: list[float], repeats: int) -> Figures:
    """Publish and read, in one process on one thread.

    Args:
        roots: new directories by the name of what they are on.
        sizes: millions of parameters.
        repeats: of each.
    """
    torch.set_num_threads(1)
    rows: list[dict[str, Cell]] = []
    for disk, root in roots.items():
        for size in sizes:
            directory = root / f"{size:g}M"
            directory.mkdir()
            streams = Streams(directory, round(size * 1e6))
            steps = [streams.write_raw, streams.publish, streams.read_raw, streams.read]
            write_raw, publish, read_raw, read = interleaved_medians(steps, repeats)
            rows.append(
                {
                    "disk": disk,
                    "M params": size,
                    "raw write MB/s": streams.num_bytes / write_raw / 1e6,
                    "publish / raw": write_raw / publish,
                    "raw read MB/s": streams.num_bytes / read_raw / 1e6,
                    "read / raw": read_raw / read,
                }
            )
    return Figures(
        "Bandwidth of records over raw files",
        rows,
        goals={"publish / raw": -0.9},
        curves=[
            ("M params", "publish / raw", "disk"),
            ("M params", "read / raw", "disk"),
        ],
    )
