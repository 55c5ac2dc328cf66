"""Damaged and crafted files: nothing but what was written is ever read as a record."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.unit.payloads import HEADER, tensors, written
from toolkit.bridge.digests import digest_tensors
from toolkit.bridge.errors import PayloadError
from toolkit.bridge.payload import Header, Record, check_sum, parse_record


def is_same(read: Record, tmp_path: Path) -> bool:
    reference = parse_record((tmp_path / "record.safetensors").read_bytes())
    return read.header == reference.header and all(
        torch.equal(read.tensors[name], tensor) for name, tensor in reference.tensors.items()
    )


def crafted(tmp_path: Path, text: str) -> bytes:
    """A file with a header text of our choice and the digest that fits it."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    save_file({}, tmp_path / "crafted", metadata={"gradient_bridge": "TEXT", "digest": digest})
    data = (tmp_path / "crafted").read_bytes()
    body = data[8:].rstrip(b" ").replace(b'"TEXT"', json.dumps(text).encode())
    return len(body).to_bytes(8, "little") + body


def test_that_every_flipped_byte_is_refused_but_white_space_in_the_padding(tmp_path: Path) -> None:
    data = written(tmp_path).read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    padding = range(len(data[:end].rstrip(b" ")), end)
    assert padding, "choose other tensors: this record has no padding, so nothing is shown of it"
    # All single bits, all bits, and what turns a blank into a tab, a line feed, a return.
    masks = [1 << bit for bit in range(8)] + [0xFF, 0x29, 0x2A, 0x2D]
    accepted = []
    for position in range(len(data)):
        for mask in masks:
            changed = bytearray(data)
            changed[position] ^= mask
            try:
                read = parse_record(bytes(changed))
            except PayloadError:
                continue
            assert is_same(read, tmp_path), f"byte {position} xor {mask:#x} made another record"
            accepted.append((position, mask))

    # White space between the end of the JSON header and the data means nothing in safetensors.
    assert accepted == [(position, mask) for position in padding for mask in masks[-3:]]


@pytest.mark.parametrize("sixteenth", range(16))
def test_that_a_truncated_file_is_refused(tmp_path: Path, sixteenth: int) -> None:
    data = written(tmp_path).read_bytes()

    with pytest.raises(PayloadError) as caught:
        parse_record(data[: len(data) * sixteenth // 16])
    assert caught.value.reason == "truncated"


@pytest.mark.parametrize("change", [b"\0", b"more"])
def test_that_bytes_after_the_end_are_refused(tmp_path: Path, change: bytes) -> None:
    with pytest.raises(PayloadError):
        parse_record(written(tmp_path).read_bytes() + change)


def test_that_a_zeroed_page_is_refused(tmp_path: Path) -> None:
    big = {"x": torch.ones(4096)}
    data = bytearray(written(tmp_path, content=big).read_bytes())
    data[8192 : 8192 + 4096] = bytes(4096)

    with pytest.raises(PayloadError) as caught:
        parse_record(bytes(data))
    assert caught.value.reason == "digest"


def test_that_a_file_of_something_else_is_alien(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "plain", metadata={"format": "pt"})

    with pytest.raises(PayloadError) as caught:
        parse_record((tmp_path / "plain").read_bytes())
    assert caught.value.reason == "alien"


def test_that_safetensors_without_metadata_or_a_huge_header_are_malformed(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "plain")
    for data in ((tmp_path / "plain").read_bytes(), b"\xff" * 64):
        with pytest.raises(PayloadError) as caught:
            parse_record(data)
        assert caught.value.reason == "malformed"


@pytest.mark.parametrize("size", [2**63, 2**64 - 1])
def test_that_an_impossible_shape_of_no_elements_is_refused(tmp_path: Path, size: int) -> None:
    # found by mutation: a zero makes any shape fit no bytes, and torch's TypeError ends the job.
    data = written(tmp_path).read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    shapes = json.loads(data[8:end])
    offsets = [len(data) - end] * 2
    shapes["c"] = {"dtype": "F32", "shape": [0, size], "data_offsets": offsets}
    text = json.dumps(shapes).encode()

    with pytest.raises(PayloadError) as caught:
        parse_record(len(text).to_bytes(8, "little") + text + data[end:])
    assert caught.value.reason == "truncated"


def fields(**changes: Any) -> dict[str, Any]:
    return {**dataclasses.asdict(HEADER), "tensors_digest": digest_tensors({}), **changes}


def test_that_a_crafted_file_passes_if_it_says_what_a_record_says(tmp_path: Path) -> None:
    read = parse_record(crafted(tmp_path, json.dumps(fields())))

    assert dataclasses.replace(read.header, tensors_digest="") == HEADER


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"format_version": 1}, "alien"),
        ({"format_version": None}, "alien"),
        ({"kind": "velocity"}, "malformed"),
        ({"kind": ["gradient"]}, "malformed"),
        ({"unknown": 1}, "malformed"),
        ({"validation": {"h2": "good"}}, "malformed"),
        ({"validation": [1.0]}, "malformed"),
    ],
)
def test_that_another_header_is_refused(
    tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    with pytest.raises(PayloadError) as caught:
        parse_record(crafted(tmp_path, json.dumps(fields(**change))))
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    "text",
    ["not json", "[]", "3", '{"format_version": 1', "[" * 100_000, '"\ud800"'],
    ids=["words", "list", "number", "cut", "nested", "surrogate"],
)
def test_that_a_header_that_is_no_object_is_refused(tmp_path: Path, text: str) -> None:
    # parse_header lets JSONDecodeError, AttributeError, RecursionError and UnicodeEncodeError
    # through, which no caller takes for a rejection.
    with pytest.raises(PayloadError):
        parse_record(crafted(tmp_path, text))


@pytest.mark.parametrize(
    "change",
    [
        {"count": "5"},
        {"receiver_step": "7"},
        {"receiver_step": None},
        {"loss": "low"},
        {"donor_step": "4"},
        {"sequence": 3.5},
        {"weights_digest": ["abc"]},
    ],
    ids=str,
)
def test_that_a_header_field_of_another_type_is_refused(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    # the types of the fields are not looked at; a string for a number ends the reading job
    # with a TypeError later on (check_sum, Inbox, metrics).
    with pytest.raises(PayloadError):
        parse_record(crafted(tmp_path, json.dumps(fields(**change))))


@pytest.mark.parametrize("value", ["x" * 100_000, [[[["x"] * 100_000]]], {"x" * 100_000: "1"}])
@pytest.mark.parametrize("field", ["kind", "count", "validation", "format_version", "unit"])
def test_that_a_rejection_says_no_more_than_a_log_can_hold(
    tmp_path: Path, field: str, value: object
) -> None:
    # found by mutation: the value stands in the log, and in a note to the donor that is too large
    # for it to read: it never hears of the rejection, and the receiver waits for a replacement.
    crafty = crafted(tmp_path, json.dumps(fields(**{field: value})))
    with pytest.raises(PayloadError) as caught:
        check_sum(parse_record(crafty), {}, "samples")

    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "number", [2**63, -(2**63) - 1, 10**400], ids=["64 bits", "-64 bits", "400"]
)
@pytest.mark.parametrize(
    "field", ["attempt", "receiver_step", "sequence", "donor_step", "count", "loss", "validation"]
)
def test_that_a_number_beyond_64_bits_is_refused(tmp_path: Path, field: str, number: int) -> None:
    # found by mutation: JSON has integers of any size, and the OverflowError of making one a float
    # (the count; the loss and the validation where they are logged) ends the reading job.
    change: Any = {"h2": number} if field == "validation" else number

    with pytest.raises(PayloadError) as caught:
        parse_record(crafted(tmp_path, json.dumps(fields(**{field: change}))))
    assert caught.value.reason == "malformed"


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Header)])
def test_that_a_header_without_a_field_is_refused(tmp_path: Path, field: str) -> None:
    # found by mutation: without its loss it was taken for one without a loss.
    left = {name: value for name, value in fields().items() if name != field}

    with pytest.raises(PayloadError):
        parse_record(crafted(tmp_path, json.dumps(left)))
