"""Digests of tensors, computed beside other work."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from torch import Tensor

from toolkit.bridge.layout import bytes_of

_PIECE_BYTES = 4 * 2**20
_NUM_THREADS = 2  # for more than one piece
_SMALL_ELEMENTS = 2**18  # that are digested about as soon as a thread starts


def digest_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over name, dtype and shape of each tensor, then over the digests of their bytes.

    Both in the order of the names. The bytes are digested in pieces of 4 MiB, by two threads. It
    tells any two sets of tensors apart whose names have no ``|``.
    """
    state, pieces = hashlib.sha256(f"{len(tensors)}|".encode()), []
    for name in sorted(tensors):
        tensor = tensors[name]
        state.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        data = bytes_of(tensor)
        pieces += [data[at : at + _PIECE_BYTES] for at in range(0, len(data), _PIECE_BYTES)]
    for digest in _digests_of(pieces):
        state.update(digest)
    return state.hexdigest()


def _digests_of(pieces: Sequence[memoryview]) -> Iterable[bytes]:
    if sum(map(len, pieces)) <= _PIECE_BYTES:
        return map(_sha256, pieces)
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        return list(pool.map(_sha256, pieces))


def _sha256(piece: memoryview) -> bytes:
    return hashlib.sha256(piece).digest()


class Digest:
    """:func:`digest_tensors` on a thread of its own, which leaves the interpreter to others.

    Args:
        tensors: not to be changed before the first :meth:`result`.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors: Mapping[str, Tensor] | None = tensors
        self._digest = ""
        self._thread: threading.Thread | None = None
        if sum(tensor.numel() for tensor in tensors.values()) > _SMALL_ELEMENTS:
            self._thread = threading.Thread(target=self._run, name="digest", daemon=True)
            self._thread.start()

    def result(self) -> str:
        """The digest, once it is known."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._tensors is not None:  # they are few, or the thread has failed: fail here
            self._run()
        return self._digest

    def _run(self) -> None:
        assert self._tensors is not None
        self._digest = digest_tensors(self._tensors)
        self._tensors = None
