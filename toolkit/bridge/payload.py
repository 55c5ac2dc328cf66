"""What crosses the disk: one record is one safetensors file with a signed-off header.

A gradient record is a sufficient statistic: the SUM over samples of the per-sample gradient and
the number of samples, with the version of the weights it was taken at. It is not a mean, and not
scaled by a loss scaler, a world size or an accumulation count. Nothing here is pickled.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from toolkit.bridge.authentication import UNSIGNED, Signer
from toolkit.bridge.compression import COMPRESSIONS, Compression, decode
from toolkit.bridge.digests import Digest
from toolkit.bridge.errors import PayloadError
from toolkit.bridge.layout import header_bytes, parse_entries, view_tensors, write_file
from toolkit.inner_products import is_finite, squared_norm

FORMAT_VERSION = 3
Kind = Literal["gradient", "delta", "weights", "skip", "end"]
_SUMS: tuple[Kind, ...] = ("gradient", "delta")
_HEADER_KEY, _DIGEST_KEY, _SIGNATURE_KEY = "gradient_bridge", "digest", "hmac_sha256"
_UNKNOWN = "0" * 64  # as long as a digest


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """The metadata of one record."""

    kind: Kind
    run_id: str  # of the run that the record belongs to
    job: str  # the stream that published it: "receiver", a donor's name, or its weights stream
    sequence: int = -1  # its number in that stream, from 0; filled in where it is published
    attempt: int  # the weights version: which start of the receiver ...
    receiver_step: int  # ... and after how many of its optimizer steps
    weights_digest: str  # digest of the weights published, or that the gradient was taken at
    head: str = ""  # of a donor's record: the module that it is for, beside the backbone
    donor_step: int = 0  # accumulation windows that the donor has completed, this one included
    count: float = 0.0  # samples in the sum
    unit: str = "samples"  # what `count` counts
    loss: float | None = None  # mean loss over `count`, for display
    # What the receiver's weights are worth on the donor's validation data, by name.
    validation: dict[str, float] = dataclasses.field(default_factory=dict)
    compression: Compression = "none"  # of its tensors: what a gradient or a difference may be
    tensors_digest: str = ""  # digest of the record's own tensors, compressed if they are
    format_version: int = FORMAT_VERSION

    def with_digest(self, digest: str) -> Header:
        """The header of a record whose tensors have this digest."""
        header = dataclasses.replace(self, tensors_digest=digest)
        is_unknown = self.kind == "weights" and not self.weights_digest
        return header.of_weights(digest) if is_unknown else header

    def of_weights(self, digest: str) -> Header:
        """The same place, for weights with this digest."""
        return dataclasses.replace(self, kind="weights", weights_digest=digest)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """A header with its tensors (by plain parameter name, on the CPU) and its size on disk."""

    header: Header
    tensors: dict[str, Tensor]
    num_bytes: int

    @functools.cached_property
    def squares(self) -> dict[str, float]:
        """The sum of squares of each tensor: one pass for all who look at the values."""
        return {name: squared_norm([tensor]) for name, tensor in self.tensors.items()}


def _check_header_text(text: str, metadata: Mapping[str, str], signer: Signer) -> None:
    data = text.encode(errors="surrogatepass")
    signer.check("record", data, metadata.get(_SIGNATURE_KEY))
    if not signer.has_key and hashlib.sha256(data).hexdigest() != metadata.get(_DIGEST_KEY):
        raise PayloadError("digest", "the header's digest does not match its text")


def write_record(
    path: Path,
    header: Header,
    tensors: Mapping[str, Tensor],
    signer: Signer = UNSIGNED,
    digest: Digest | None = None,
) -> Header:
    """Write a record to ``path`` (not atomically: the transport sees to that).

    Args:
        path: the file to write.
        header: its metadata; ``tensors_digest`` is filled in here, and so is, of weights,
            ``weights_digest`` where it is empty: it is the same.
        tensors: by name; may be empty.
        signer: of the run; with a key, what it signs holds the digest of the tensors.
        digest: of the tensors, where it has been begun already.

    Returns:
        The header as written.

    Raises:
        ValueError: for a name with a ``|``, which no reader takes.
        OSError: if the disk fails.
    """
    if any("|" in name for name in tensors):
        raise ValueError(f"a name of a tensor must have no '|': {sorted(tensors)}")
    digest = digest or Digest(tensors)  # while they are written
    draft = _metadata_of(header.with_digest(_UNKNOWN), signer)
    write_file(
        path, tensors, draft, lambda: _metadata_of(header.with_digest(digest.result()), signer)
    )
    # Who may enter the directory may read what lies in it, whatever this job's umask.
    path.chmod(path.parent.stat().st_mode & 0o666)
    return header.with_digest(digest.result())


def _metadata_of(header: Header, signer: Signer) -> dict[str, str]:
    text = json.dumps(dataclasses.asdict(header), sort_keys=True)
    if signer.has_key:
        proof = {_SIGNATURE_KEY: signer.sign("record", text.encode())}
    else:
        proof = {_DIGEST_KEY: hashlib.sha256(text.encode()).hexdigest()}
    return {_HEADER_KEY: text, **proof}


def parse_header(data: bytes | memoryview, signer: Signer = UNSIGNED) -> Header:
    """The header of a record from its first bytes (all of the safetensors header, at least).

    Raises:
        PayloadError: if there is no header, or it is not the one that was written; with a key, by
            a job of this run.
    """
    metadata, _ = parse_entries(data)
    return _header_of(metadata, signer)


def _header_of(metadata: Mapping[str, str], signer: Signer) -> Header:
    text = metadata.get(_HEADER_KEY)
    if text is None:
        raise PayloadError("alien", f"no {_HEADER_KEY!r} entry: not a file of this bridge")
    _check_header_text(text, metadata, signer)
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PayloadError("malformed", f"the header is no JSON: {error}") from None
    if not isinstance(fields, dict):
        raise PayloadError("malformed", f"the header is a {type(fields).__name__}, no object")
    if fields.get("format_version") != FORMAT_VERSION:
        raise PayloadError(
            "alien",
            f"format version {reprlib.repr(fields.get('format_version'))}, this package reads "
            f"{FORMAT_VERSION}",
        )
    return _checked_header(fields)


def _checked_header(fields: dict[str, Any]) -> Header:
    types = {"str": (str,), "int": (int,), "float": (int, float), "Kind": (str,)}
    types |= {"Compression": (str,)}
    types |= {"float | None": (int, float, type(None)), "dict[str, float]": (dict,)}
    known = {field.name for field in dataclasses.fields(Header)}
    if missing := known - set(fields):
        raise PayloadError("malformed", f"header field {min(missing)!r} is missing")
    if unknown := set(fields) - known:
        raise PayloadError("malformed", f"header field {min(unknown)!r} is unknown")
    for field in dataclasses.fields(Header):
        value = fields[field.name]
        if type(value) not in types[str(field.type)] or not _fits(value):
            raise PayloadError("malformed", f"header field {field.name} is {reprlib.repr(value)}")
    for name, value in fields["validation"].items():
        if type(value) not in types["float"] or not _fits(value):
            raise PayloadError("malformed", f"validation of {name!r} is {reprlib.repr(value)}")
    if fields["kind"] not in get_args(Kind):
        raise PayloadError("malformed", f"kind {fields['kind']!r} is unknown")
    compression, is_sum = fields["compression"], fields["kind"] in _SUMS
    if compression not in COMPRESSIONS or (compression != "none" and not is_sum):
        raise PayloadError("malformed", f"compression {compression!r} of a {fields['kind']!r}")
    return Header(**fields)


def _fits(value: object) -> bool:
    """Whether a number can be computed with: JSON has integers that are beyond any float."""
    return not isinstance(value, int) or -(2**63) <= value < 2**63


def read_header(read_head: Callable[[int], bytes], signer: Signer = UNSIGNED) -> Header:
    """The header of a record of which only the beginning is read.

    Args:
        read_head: gives the first so many bytes of the file.
        signer: of the run.

    Raises:
        PayloadError: as :func:`parse_header`.
    """
    return parse_header(read_head(header_bytes(read_head(8))), signer)


def parse_record(data: bytes | memoryview, signer: Signer = UNSIGNED) -> Record:
    """A whole record, its digests verified.

    Args:
        data: the bytes of the file. Where they are writable, the tensors are views of them.
        signer: of the run.

    Raises:
        PayloadError: for anything but exactly the bytes that ``write_record`` wrote.
    """
    metadata, entries = parse_entries(data)
    header = _header_of(metadata, signer)
    view = memoryview(data)
    tensors = view_tensors(memoryview(bytearray(view)) if view.readonly else view, entries)
    record = Record(header=header, tensors=tensors, num_bytes=len(data))
    digest = Digest(tensors)
    if header.kind in _SUMS and header.compression == "none":
        _ = record.squares  # which whoever takes it needs, while the digest is computed
    if any("|" in name for name in tensors) or digest.result() != header.tensors_digest:
        raise PayloadError("digest", "the tensors' digest does not match the header")
    return record


def decompressed(record: Record, like: Mapping[str, Mapping[str, Tensor]]) -> Record:
    """The record with the tensors that were compressed; itself, if none were.

    Args:
        record: of which the digests are verified.
        like: by head, what the tensors of a payload for it are like, by name.

    Raises:
        PayloadError: if they cannot be what a payload for that head was compressed to.
    """
    header = record.header
    if header.compression == "none" or header.head not in like:
        return record
    tensors = decode(record.tensors, header.compression, like[header.head])
    return dataclasses.replace(record, tensors=tensors)


def check_identity(header: Header, *, run_id: str, job: str, sequence: int) -> None:
    """Refuse a valid record that stands in the wrong place.

    Raises:
        PayloadError: if it is of another run, another job or another number.
    """
    expected = {"run_id": run_id, "job": job, "sequence": sequence}
    for field, value in expected.items():
        found = getattr(header, field)
        if found != value:
            raise PayloadError("alien", f"{field} is {found!r}, expected {value!r}")


def check_sum(record: Record, expected: Mapping[str, Tensor], unit: str) -> None:
    """Refuse a gradient or a difference that cannot be added to the parameters ``expected``.

    Raises:
        PayloadError: for wrong names, shapes or dtypes, a count that is not finite and positive,
            another unit, or a value that is not finite.
    """
    header, tensors = record.header, record.tensors
    if missing := sorted(set(expected) - set(tensors)):
        raise PayloadError("schema", f"tensor {missing[0]!r} is missing")
    if extra := sorted(set(tensors) - set(expected)):
        raise PayloadError("schema", f"tensor {extra[0]!r} is not shared")
    for name, tensor in tensors.items():
        like = expected[name]
        if tensor.shape != like.shape or tensor.dtype != payload_dtype(like.dtype):
            raise PayloadError(
                "schema",
                f"tensor {name!r} is {tensor.dtype} {tuple(tensor.shape)}, expected "
                f"{payload_dtype(like.dtype)} {tuple(like.shape)}",
            )
    if not math.isfinite(header.count) or header.count <= 0:
        raise PayloadError("count", f"count {header.count!r} is not finite and positive")
    if header.unit != unit:
        raise PayloadError("unit", f"the count is in {header.unit!r}, expected {unit!r}")
    for name, squares in record.squares.items():
        if not is_finite(tensors[name], squares):
            raise PayloadError("nonfinite", f"a {header.kind} value of {name!r} is not finite")


def payload_dtype(parameter_dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a gradient crosses: the parameter's, but at least float32."""
    return torch.promote_types(parameter_dtype, torch.float32)
