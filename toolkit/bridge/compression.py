"""Fewer bytes in a donor's payloads: rounded values, or the largest ones only, with memory.

``bf16`` rounds every value to nearest, by at most 2^-8 of it. ``topk`` sends the share of the
elements that are largest in magnitude, over all tensors together, as bfloat16 with their places:
16 bits within a block of 65,536 elements, and how many there are in each block; 4 bytes an element.
What it leaves out is kept and added to the next payload (error feedback), so that it is late and
not lost. Over all tensors, because a share of each would send the small values of one in place of
large ones of another; a tensor whose values are small waits until they have added up.

Rounding has no memory: it changes no value by more than 0.4 %, which is not worth two copies of all
that crosses.

References:
    Seide et al., 1-Bit Stochastic Gradient Descent, Interspeech 2014.
    Stich et al., Sparsified SGD with Memory, 2018, arXiv 1809.07599, algorithm 1.
    Karimireddy et al., Error Feedback Fixes SignSGD, 2019, arXiv 1901.09847.
    Lin et al., Deep Gradient Compression, 2018, arXiv 1712.01887: finding the largest by a sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from toolkit.bridge.errors import PayloadError
from toolkit.inner_products import squared_norm

Compression = Literal["none", "bf16", "topk"]
COMPRESSIONS: tuple[Compression, ...] = get_args(Compression)

_VALUES, _PLACES, _COUNTS = "values", "places", "counts"
_BLOCK = 2**16  # elements whose places within it are told apart by 16 bits
_LARGEST = torch.finfo(torch.bfloat16).max
_SAMPLED, _MARGIN = 2**16, 1.25  # elements that a bound is guessed from, and how low it is guessed


def check_compressible(tensors: Mapping[str, Tensor], compression: Compression) -> None:
    """Refuse to compress what a bfloat16 cannot hold.

    Raises:
        ValueError: naming a complex tensor, whose imaginary part would be lost.
    """
    for name, tensor in tensors.items():
        if compression != "none" and tensor.is_complex():
            raise ValueError(
                f"compression {compression!r} would lose the imaginary part of {name!r}, which is "
                f"{tensor.dtype}: use compression 'none'"
            )


def round_values(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every value to the nearest bfloat16."""
    return {name: tensor.bfloat16() for name, tensor in tensors.items()}


class ErrorFeedback:
    """Sends the largest elements of each payload and keeps the rest for the next one.

    A payload is a sum S over n samples, and the receiver steps by S / n: that is what must not get
    lost. With the residual e in the unit of the mean, a payload is C(S + n e), of which the
    receiver takes c = C(S + n e) / n, and e becomes S / n + e - c: all that was applied and the
    residual add up to all means, whatever the counts. A residual in the unit of the sum would be
    weighed by 1 / n of another payload. (Under the rescaling rules ``append`` and ``pool`` the
    receiver's count stands in the place of n; there they add up while the counts stay the same.)

    A payload that is refused is as if it was never sent, if that is known before the next one is.
    One that is dropped, because it is too old or of other weights, takes with it what it held.

    Args:
        ratio: share of a payload's elements that is sent.

    Attributes:
        residual_norm: after the newest payload, in the unit of the mean.
    """

    def __init__(self, ratio: float) -> None:
        self._ratio = ratio
        self._residual: Tensor | None = None  # flat, without what the newest payload has changed
        self._newest: tuple[int, Tensor] | None = None  # its number, and the residual after it
        self.residual_norm = 0.0

    def settle(self, is_rejected: Callable[[int], bool]) -> None:
        """Before the next record: the newest payload counts, unless the receiver has refused it."""
        if self._newest is not None:
            sequence, after = self._newest
            if not is_rejected(sequence):
                self._residual = after
            self._newest = None

    def encode(self, sums: Mapping[str, Tensor], count: float) -> tuple[dict[str, Tensor], Tensor]:
        """The largest elements of a payload with the residual added; changes nothing here.

        Args:
            sums: the payload, finite, on the CPU.
            count: what the receiver divides it by, positive; 1 for a difference.

        Returns:
            The tensors to send, and the residual after them, for :meth:`note_sent`.
        """
        flat = _flat(sums)
        if self._residual is not None:
            flat.add_(self._residual, alpha=count)
        places = largest(flat, math.ceil(self._ratio * flat.numel()))
        values = flat[places].clamp(-_LARGEST, _LARGEST).bfloat16()
        flat[places] -= values.to(flat.dtype)
        flat /= count
        counts = torch.bincount(places // _BLOCK, minlength=_num_blocks(flat.numel())).int()
        return {
            _VALUES: values,
            _PLACES: (places % _BLOCK - _BLOCK // 2).to(torch.int16),
            _COUNTS: counts,
        }, flat

    def note_sent(self, sequence: int, residual: Tensor) -> None:
        """A payload is published under this number; ``residual`` is what is left after it."""
        self._newest = sequence, residual
        self.residual_norm = math.sqrt(squared_norm([residual]))

    def state(self) -> tuple[dict[str, Tensor], int]:
        """What a checkpoint must hold: tensors by name, and a number."""
        tensors = {} if self._residual is None else {"residual": self._residual}
        sequence = -1
        if self._newest is not None:
            sequence, tensors["newest"] = self._newest
        return tensors, sequence

    def load_state(self, tensors: Mapping[str, Tensor], sequence: int) -> None:
        """Restore :meth:`state`."""
        self._residual = tensors.get("residual")
        self._newest = (sequence, tensors["newest"]) if "newest" in tensors else None


def largest(flat: Tensor, number: int) -> Tensor:
    """The places of the largest elements in magnitude, exactly so many, in ascending order.

    Of equal ones the first. A sample gives a bound that a few too many elements reach, which a
    selection then has to look at; it looks at all of them where the sample was misleading.

    Args:
        flat: (N,), finite, on the CPU.
        number: of them, from 1 to N.
    """
    magnitudes = flat.abs().numpy()
    sample = magnitudes[:: len(magnitudes) // _SAMPLED | 1]  # odd: no fixed columns of a matrix
    rank = max(0, int(len(sample) * (1 - _MARGIN * number / len(magnitudes))))
    candidates = np.flatnonzero(magnitudes >= np.partition(sample, rank)[rank])
    if len(candidates) < number:
        candidates = np.arange(len(magnitudes))
    found = magnitudes[candidates]
    smallest = np.partition(found, len(found) - number)[len(found) - number]
    above = candidates[found > smallest]
    equal = candidates[found == smallest][: number - len(above)]
    return torch.from_numpy(np.sort(np.concatenate([above, equal])))


def decode(
    tensors: Mapping[str, Tensor], compression: str, like: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """A payload as it was before it was compressed, but for what was left out.

    How large it is, its reader says, whatever the payload claims.

    Args:
        tensors: as they were read.
        compression: how they are compressed, as their header says.
        like: what they are to be like, in shape and dtype, by name; only looked at.

    Raises:
        PayloadError: if they are not what :class:`ErrorFeedback` or :func:`round_values` make.
    """
    if compression == "bf16":
        return _widen(tensors, like)
    if compression == "topk":
        return _scatter(tensors, like)
    return dict(tensors)


def _widen(tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    for name, tensor in tensors.items():
        if tensor.dtype != torch.bfloat16:
            raise PayloadError("schema", f"tensor {name!r} of a bf16 payload is {tensor.dtype}")
    # A name that is not expected, and a shape, are what every payload is checked for.
    return {n: t.to(like[n].dtype) if n in like else t for n, t in tensors.items()}


def _scatter(tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    size = sum(tensor.numel() for tensor in like.values())
    number = len(tensors[_VALUES]) if _VALUES in tensors and tensors[_VALUES].ndim else -1
    expected = {
        _VALUES: (torch.bfloat16, (number,)),
        _PLACES: (torch.int16, (number,)),
        _COUNTS: (torch.int32, (_num_blocks(size),)),
    }
    found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    if found != expected:
        raise PayloadError("schema", f"a topk payload has {found}, expected {expected}")
    values, counts = tensors[_VALUES], tensors[_COUNTS]
    if bool((counts < 0).any()) or int(counts.sum()) != number:
        raise PayloadError("malformed", f"a topk payload counts {int(counts.sum())} of {number}")
    block = torch.arange(len(counts)).repeat_interleave(counts)
    places = block * _BLOCK + tensors[_PLACES] + _BLOCK // 2
    if not bool((places[1:] > places[:-1]).all()):
        raise PayloadError("malformed", "the places of a topk payload do not ascend")
    if number and int(places[-1]) >= size:
        raise PayloadError("malformed", f"a topk payload has place {int(places[-1])} of {size}")
    dense, begin, first = {}, 0, 0
    for name in sorted(like):
        tensor = torch.zeros(like[name].shape, dtype=like[name].dtype)
        end = begin + tensor.numel()
        last = int(torch.searchsorted(places, end))
        tensor.view(-1)[places[first:last] - begin] = values[first:last].to(tensor.dtype)
        dense[name], begin, first = tensor, end, last
    return dense


def compressed_bytes(tensors: Iterable[Tensor], compression: Compression, topk_ratio: float) -> int:
    """The size of a payload of tensors like these, without its header."""
    tensors = list(tensors)
    size = sum(tensor.numel() for tensor in tensors)
    if compression == "bf16":
        return size * torch.bfloat16.itemsize
    if compression == "topk":
        each = torch.bfloat16.itemsize + torch.int16.itemsize
        return math.ceil(topk_ratio * size) * each + _num_blocks(size) * torch.int32.itemsize
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


def _flat(tensors: Mapping[str, Tensor]) -> Tensor:
    """A copy of all elements, in the order of the names."""
    return torch.cat([tensors[name].reshape(-1) for name in sorted(tensors)])


def _num_blocks(size: int) -> int:
    return math.ceil(size / _BLOCK)
