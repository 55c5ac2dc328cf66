"""A key, what it signs, and records that are not signed with it."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.unit.keys import KEY, NOT_THIS_RUNS, OTHER_KEY, SIGNER, key_file
from toolkit.bridge.authentication import (
    KEY_VARIABLE,
    MAX_KEY_BYTES,
    UNSIGNED,
    Signer,
    load_key,
)
from toolkit.bridge.errors import BridgeError, PayloadError
from toolkit.bridge.payload import Header, parse_header, parse_record, write_record

HEADER = Header(
    kind="gradient", run_id="run", job="donor", sequence=3, attempt=1, receiver_step=7,
    weights_digest="abc", head="heads.h2", count=5.0, loss=0.25,
)  # fmt: skip

# -- the key -----------------------------------------------------------------------------------


def test_where_a_key_comes_from(tmp_path: Path) -> None:
    path = key_file(tmp_path, KEY + b"\n")
    environment = {KEY_VARIABLE: KEY.decode()}

    assert load_key(None, {}) is None
    assert load_key(None, environment) == KEY
    assert load_key(path, {}) == KEY
    assert load_key(path, environment) == KEY, "the same key twice"
    path.chmod(0o400)
    assert load_key(path, {}) == KEY


@pytest.mark.parametrize(
    ("content", "variable", "message"),
    [
        (KEY, OTHER_KEY.decode(), "hold different keys"),
        (b"15 bytes, short\n", None, "has 15 bytes.*openssl rand"),
        (b"k" * (MAX_KEY_BYTES + 1), None, "16 to 4096"),
        (None, "", f"the key in {KEY_VARIABLE} has 0 bytes"),
        (None, "too short", f"the key in {KEY_VARIABLE} has 9 bytes"),
    ],
)
def test_keys_that_are_refused(
    tmp_path: Path, content: bytes | None, variable: str | None, message: str
) -> None:
    path = None if content is None else key_file(tmp_path, content)
    environment = {} if variable is None else {KEY_VARIABLE: variable}
    with pytest.raises(BridgeError, match=message) as caught:
        load_key(path, environment)
    for key in (content, variable):
        assert not key or str(key) not in str(caught.value)


@pytest.mark.parametrize("mode", [0o640, 0o620, 0o610, 0o604, 0o602, 0o601])
def test_that_a_key_file_is_its_owners_alone(tmp_path: Path, mode: int) -> None:
    with pytest.raises(BridgeError, match=f"mode {mode:04o}.: chmod 600 .*/key"):
        load_key(key_file(tmp_path, KEY, mode), {})


@pytest.mark.timeout(20)
@pytest.mark.parametrize("make", [None, os.mkdir, os.mkfifo])
def test_key_files_that_are_none(tmp_path: Path, make: Callable[[Path], None] | None) -> None:
    if make is not None:
        make(tmp_path / "key")
    with pytest.raises(BridgeError, match=r"key file .*/key (is no plain file|cannot be read: \w)"):
        load_key(tmp_path / "key", {})


def test_that_a_signer_does_not_give_its_key_away() -> None:
    assert KEY.decode() not in f"{SIGNER!r} {SIGNER} {[SIGNER]}"
    assert not hasattr(SIGNER, "__dict__"), "vars() would show it"
    for leak in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="not to be pickled"):
            leak(SIGNER)


# -- records -----------------------------------------------------------------------------------


def written(tmp_path: Path, signer: Signer = SIGNER, **tensors: torch.Tensor) -> Path:
    path = tmp_path / "record.safetensors"
    write_record(path, HEADER, tensors or {"a": torch.arange(6.0)}, signer)
    return path


def test_that_a_signed_record_is_read_by_who_has_the_key(tmp_path: Path) -> None:
    data = written(tmp_path).read_bytes()

    assert parse_record(data, SIGNER).tensors["a"].tolist() == list(range(6))
    assert parse_header(data, SIGNER).sequence == 3
    with pytest.raises(PayloadError, match=f"is signed, but no key is given here.*{KEY_VARIABLE}"):
        parse_record(data)


@pytest.mark.parametrize("signer", NOT_THIS_RUNS, ids=["no key", "other key", "other run"])
def test_that_a_record_of_others_is_refused(tmp_path: Path, signer: Signer) -> None:
    data = written(tmp_path, signer).read_bytes()

    for parse in (parse_record, parse_header):
        with pytest.raises(PayloadError) as caught:
            parse(data, SIGNER)
        assert caught.value.reason == "unauthenticated"


def test_that_no_changed_byte_of_a_signed_record_is_accepted(tmp_path: Path) -> None:
    data = written(tmp_path).read_bytes()
    end = 8 + struct.unpack("<Q", data[:8])[0]
    padding = range(len(data[:end].rstrip(b" ")), end)  # means nothing in safetensors
    for position in set(range(len(data))) - set(padding):
        for mask in (0x01, 0x20, 0x80, 0xFF):
            changed = bytearray(data)
            changed[position] ^= mask
            with pytest.raises(PayloadError):
                parse_record(bytes(changed), SIGNER)


def rebuilt(data: bytes, **metadata: str | None) -> bytes:
    """What who has no key can make of a record: the same tensors with other metadata."""
    end = 8 + struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:end])
    changed = header["__metadata__"] | metadata
    header["__metadata__"] = {name: value for name, value in changed.items() if value is not None}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[end:]


def refusal(data: bytes) -> str:
    with pytest.raises(PayloadError) as caught:
        parse_record(data, SIGNER)
    return caught.value.reason


@pytest.mark.parametrize(
    "change",
    [{"sequence": 4}, {"receiver_step": 8}, {"count": 1e9}, {"tensors_digest": ""}, {"job": "x"}],
    ids=str,
)
def test_that_the_header_is_signed(tmp_path: Path, change: dict[str, Any]) -> None:
    data = written(tmp_path).read_bytes()
    fields = dataclasses.asdict(parse_header(data, SIGNER))
    text = json.dumps(fields, sort_keys=True)
    assert parse_record(rebuilt(data, gradient_bridge=text), SIGNER), "the same text is accepted"
    text = json.dumps(fields | change, sort_keys=True)

    assert refusal(rebuilt(data, gradient_bridge=text)) == "unauthenticated"


@pytest.mark.parametrize("signature", [None, "", "0" * 64, "\u00e9" * 32, "\ud800"], ids=ascii)
def test_signatures_that_are_none(tmp_path: Path, signature: str | None) -> None:
    data = written(tmp_path).read_bytes()
    unsigned = written(tmp_path, UNSIGNED).read_bytes()

    assert refusal(rebuilt(data, hmac_sha256=signature)) == "unauthenticated"
    assert refusal(rebuilt(unsigned, hmac_sha256=signature)) == "unauthenticated"


def test_that_two_tensors_cannot_be_made_one(tmp_path: Path) -> None:
    """The digest's text of two tensors is that of one whose name holds the first one's bytes."""
    path = written(tmp_path, a=torch.zeros(2), b=torch.ones(3))
    data = path.read_bytes()
    metadata = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])["__metadata__"]
    name = "a|torch.float32|(2,)|" + "\0" * 8 + "b"
    save_file({name: torch.ones(3)}, path, metadata)

    with pytest.raises(PayloadError):
        parse_record(path.read_bytes(), SIGNER)
    with pytest.raises(ValueError, match=r"must have no '\|'"):
        write_record(path, HEADER, {"a|b": torch.ones(1)}, SIGNER)
