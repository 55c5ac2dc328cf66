"""Ways to hand tensors from one process to another, one class each; what a user does instead.

Both sides make an object of the same class over the same directory. One sends its tensors, the
other receives; then the other way round. Whoever reads a file deletes it, so that what was never
synced is never written to the disk by the sync of another way's file.
"""

from __future__ import annotations

import inspect
import os
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save

from toolkit.benchmarks.bridge.raw import POLL_SECONDS, RawHandOver
from toolkit.bridge.files import fsync_path

Side = Literal["receiver", "donor"]
Tensors = Mapping[str, Tensor]


def other(side: Side) -> Side:
    """The process that is at the other end."""
    return "donor" if side == "receiver" else "receiver"


def num_bytes_of(tensors: Tensors) -> int:
    """Bytes of all of them."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


class Way:
    """One side of a hand-over to and fro.

    Args:
        directory: of this way, on the disk that is measured; both sides', must exist.
        side: which one this is.
        tensors: that this side sends, in every round.

    Attributes:
        num_torn: how often a file was there that was not whole yet.
    """

    title = ""
    durable = "no"  # whether what was sent survives a power cut, once ``send`` has returned
    may_tear = False  # whether a reader may find a part of what is sent

    def __init__(self, directory: Path, side: Side, tensors: Tensors) -> None:
        self.directory, self.side, self.tensors = directory, side, tensors
        self.num_torn = 0

    @classmethod
    def lacks(cls) -> str:
        """Why it cannot be measured here, in two words; empty if it can."""
        return ""

    def send(self, number: int) -> None:
        """Hand over; returns once the tensors may be changed again."""
        raise NotImplementedError

    def wait(self, number: int) -> None:
        """Wait until what the other side hands over is there, where that can be seen."""

    def receive(self, number: int) -> Tensors:
        """Take what the other side hands over in this round."""
        raise NotImplementedError

    def path(self, side: Side, number: int) -> Path:
        """The file of a round that a side writes."""
        return self.directory / f"{side}-{number}.pt"

    def wait_for(self, path: Path) -> None:
        """Wait for a file."""
        while not path.exists():
            time.sleep(POLL_SECONDS)

    def is_right(self, received: Tensors, theirs: Tensors) -> bool:
        """Whether what the last round has brought is what the other side sends."""
        return received.keys() == theirs.keys() and all(
            torch.equal(tensor, theirs[name]) for name, tensor in received.items()
        )

    def close(self) -> None:
        """No further round comes."""


class RawFile(Way):
    """The floor: bytes, as durable and as certain as a record of the bridge."""

    title = "raw bytes"
    durable = "yes"

    def __init__(self, directory: Path, side: Side, tensors: Tensors) -> None:
        super().__init__(directory, side, tensors)
        self._raw = RawHandOver(directory, num_bytes_of(tensors))

    def send(self, number: int) -> None:
        self._raw.write(self.path(self.side, number).name)

    def wait(self, number: int) -> None:
        self.wait_for(self.path(other(self.side), number))

    def receive(self, number: int) -> Tensors:
        self._raw.read(self.path(other(self.side), number).name)
        return {}

    def is_right(self, received: Tensors, theirs: Tensors) -> bool:
        return True  # the digest was compared


class Saved(Way):
    """``torch.save`` straight to the final name, as the seed of this project does."""

    title = "torch.save"
    may_tear = True

    def send(self, number: int) -> None:
        torch.save(self.tensors, self.path(self.side, number))

    def wait(self, number: int) -> None:
        self.wait_for(self.path(other(self.side), number))

    def receive(self, number: int) -> Tensors:
        path = self.path(other(self.side), number)
        while True:
            try:
                tensors: Tensors = torch.load(path)
            except Exception:  # torch.load has no error of its own for half a file
                self.num_torn += 1
            else:
                path.unlink()
                return tensors
            time.sleep(POLL_SECONDS)


class Renamed(Saved):
    """``torch.save`` to a temporary name."""

    title = "save, rename"
    may_tear = False

    def send(self, number: int) -> None:
        path = self.path(self.side, number)
        temporary = path.with_suffix(".tmp")
        torch.save(self.tensors, temporary)
        self.sync(temporary)
        os.replace(temporary, path)
        self.sync(self.directory)

    def sync(self, path: Path) -> None:
        """Make a file or a directory durable, where this way does."""


class Synced(Renamed):
    """The same, made durable."""

    title = "save, fsync"
    durable = "yes"

    def sync(self, path: Path) -> None:
        fsync_path(path)


class AsyncCheckpoint(Way):
    """``torch.distributed.checkpoint.async_save``: copied at once, written and synced behind.

    Its last file appears by a rename and says that the others are whole.
    """

    title = "DCP async"
    durable = "later"

    @classmethod
    def lacks(cls) -> str:
        return "" if "no_dist" in inspect.signature(async_save).parameters else "old torch"

    def __init__(self, directory: Path, side: Side, tensors: Tensors) -> None:
        super().__init__(directory, side, tensors)
        self._saving: Future[Any] | None = None
        self._loaded = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}

    def send(self, number: int) -> None:
        self.close()
        saving = async_save(
            dict(self.tensors), checkpoint_id=self.path(self.side, number), no_dist=True
        )
        assert isinstance(saving, Future)
        self._saving = saving

    def wait(self, number: int) -> None:
        self.wait_for(self.path(other(self.side), number) / ".metadata")

    def receive(self, number: int) -> Tensors:
        path = self.path(other(self.side), number)
        load(self._loaded, checkpoint_id=path, no_dist=True)
        shutil.rmtree(path)
        return self._loaded

    def close(self) -> None:
        """Wait for the writing of the newest one; raises what has failed there."""
        if self._saving is not None:
            self._saving.result()
            self._saving = None


class SendReceive(Way):
    """The same bytes over the loopback network, point to point, with gloo."""

    title = "gloo send"

    def __init__(self, directory: Path, side: Side, tensors: Tensors) -> None:
        super().__init__(directory, side, tensors)
        _join(directory.parent, side)
        self._out = torch.cat([tensor.flatten() for tensor in tensors.values()])
        self._in = torch.empty_like(self._out)

    def send(self, number: int) -> None:
        dist.send(self._out, _rank(other(self.side)))

    def receive(self, number: int) -> Tensors:
        dist.recv(self._in, _rank(other(self.side)))
        return _unflatten(self._in, self.tensors)


class AllReduce(Way):
    """What one job of both would do in place of a round: the mean of gradients, with gloo."""

    title = "gloo reduce"

    def __init__(self, directory: Path, side: Side, tensors: Tensors) -> None:
        super().__init__(directory, side, tensors)
        _join(directory.parent, side)
        self._mean = torch.cat([tensor.flatten() for tensor in tensors.values()])

    def send(self, number: int) -> None:
        if self.side == "receiver":
            self._reduce()

    def receive(self, number: int) -> Tensors:
        if self.side == "donor":
            self._reduce()
        return _unflatten(self._mean, self.tensors)

    def is_right(self, received: Tensors, theirs: Tensors) -> bool:
        means = {name: (tensor + theirs[name]) / 2 for name, tensor in self.tensors.items()}
        return all(torch.allclose(received[name], mean) for name, mean in means.items())

    def _reduce(self) -> None:
        dist.all_reduce(self._mean.div_(2))  # as DDP does; the mean of means is the same again


def _unflatten(flat: Tensor, like: Tensors) -> Tensors:
    parts = flat.split([tensor.numel() for tensor in like.values()])
    return {
        name: part.view_as(tensor) for (name, tensor), part in zip(like.items(), parts, strict=True)
    }


def _rank(side: Side) -> int:
    return ("receiver", "donor").index(side)


def _join(root: Path, side: Side) -> None:
    """Meet the other process, once."""
    if not dist.is_initialized():
        meeting = (root / "meeting").absolute().as_uri()
        dist.init_process_group("gloo", init_method=meeting, rank=_rank(side), world_size=2)
