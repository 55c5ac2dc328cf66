"""The layout of a safetensors file, written and read in place: no byte of a tensor is copied.

The library of that name takes all of the metadata before the first byte of a tensor, and reads
every tensor into new memory. Here the metadata come last, so that a digest in them can be computed
while the tensors are written, and tensors that are read are views of the file's bytes. A file is 8
bytes with the length of a JSON header, the header, and the tensors one after the other.
"""

from __future__ import annotations

import io
import json
import math
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from toolkit.bridge.errors import PayloadError

MAX_HEADER_BYTES = 16 * 2**20
_PREFIX_BYTES = 8
_LONG_BYTES = 4 * 2**20  # of tensors, which take longer to write than to begin to
_METADATA = "__metadata__"
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
Finish = Callable[[], Mapping[str, str]]


def write_file(
    path: Path, tensors: Mapping[str, Tensor], draft: Mapping[str, str], final: Finish
) -> None:
    """Write a file.

    Args:
        path: of the file.
        tensors: on the CPU, by name.
        draft: the metadata, with other values of the same length where they are not known yet.
        final: gives the metadata, after the tensors are written.

    Raises:
        OSError: if the disk fails.
    """
    entries, position = {}, 0
    # The widest first: so each begins at a multiple of its elements' size.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    for name in order:
        tensor = tensors[name]
        begin, position = position, position + tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, position],
        }
    header = _encode(draft, entries)
    with path.open("wb", buffering=0) as file:
        _write_all(file, header)
        for name in order:
            _write_all(file, bytes_of(tensors[name]))
        if position > _LONG_BYTES:  # on its way to the disk while the last of it is digested
            os.fsync(file.fileno())
        finished = _encode(final(), entries)
        assert len(finished) == len(header), "the draft is as long as what comes in its place"
        file.seek(0)
        _write_all(file, finished)


def _encode(metadata: Mapping[str, str], entries: Mapping[str, Any]) -> bytes:
    text = json.dumps({_METADATA: metadata, **entries}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _PREFIX_BYTES)  # the tensors begin at a multiple of 8
    return struct.pack("<Q", len(text)) + text


def _write_all(file: io.FileIO, data: bytes | memoryview) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def bytes_of(tensor: Tensor) -> memoryview:
    """A tensor's elements, in order; not copied where they lie so on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return memoryview(flat.numpy())  # type: ignore[arg-type]


def header_bytes(start: bytes | memoryview) -> int:
    """How many bytes of a file come before its tensors, as its first 8 bytes say.

    Raises:
        PayloadError: if they are fewer than 8, or say too many.
    """
    if len(start) < _PREFIX_BYTES:
        raise PayloadError("truncated", f"{len(start)} bytes are too few for a safetensors file")
    (length,) = struct.unpack("<Q", start[:_PREFIX_BYTES])
    if length > MAX_HEADER_BYTES:
        raise PayloadError("malformed", f"header length {length} is above {MAX_HEADER_BYTES}")
    return _PREFIX_BYTES + int(length)


def parse_entries(data: bytes | memoryview) -> tuple[dict[str, str], dict[str, Any]]:
    """The metadata of a file and what it says of each tensor, from its first bytes.

    Raises:
        PayloadError: if there is no header, or it has no metadata.
    """
    start = header_bytes(data)
    if len(data) < start:
        raise PayloadError("truncated", f"header of {start} bytes, file of {len(data)}")
    try:
        entries = json.loads(str(data[_PREFIX_BYTES:start], "utf-8"))  # and no other
        metadata = {str(key): str(value) for key, value in entries.pop(_METADATA).items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise PayloadError("malformed", f"no metadata in the safetensors header: {error}") from None
    return metadata, entries


def view_tensors(data: memoryview, entries: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a file as views of its bytes, which must be writable and stay as they are.

    Args:
        data: the whole file.
        entries: of its header.

    Raises:
        PayloadError: if they do not lie one after the other, up to the end of the file.
    """
    position, tensors = header_bytes(data), {}
    try:
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            dtype, shape = _DTYPES[entry["dtype"]], entry["shape"]
            count = math.prod(shape)
            begin, end = (header_bytes(data) + offset for offset in entry["data_offsets"])
            if begin != position or end - begin != count * dtype.itemsize or end > len(data):
                raise ValueError(f"tensor {name!r} is not where it should be")
            if count:
                flat = torch.frombuffer(data, dtype=dtype, count=count, offset=begin)
                tensors[name] = flat.view(shape)
            else:
                tensors[name] = torch.empty(shape, dtype=dtype)
            position = end
    except (ValueError, KeyError, TypeError, RuntimeError, AttributeError, OverflowError) as error:
        raise PayloadError("truncated", f"not a complete safetensors file: {error}") from None
    if position != len(data):
        raise PayloadError("truncated", f"tensors end at {position} of {len(data)} bytes")
    return tensors
