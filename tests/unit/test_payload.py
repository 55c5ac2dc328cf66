"""One record: what it holds, and which gradients are refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from tests.unit.payloads import HEADER, tensors, written
from toolkit.bridge.digests import digest_tensors
from toolkit.bridge.errors import PayloadError
from toolkit.bridge.payload import (
    Record,
    check_identity,
    check_sum,
    parse_header,
    parse_record,
    payload_dtype,
    write_record,
)
from toolkit.inner_products import all_finite

EXPECTED = {"a": torch.zeros(2, 3), "b": torch.zeros(3, dtype=torch.float64)}


def record(content: dict[str, Tensor] | None = None, **changes: Any) -> Record:
    header = dataclasses.replace(HEADER, **changes)
    return Record(header=header, tensors=tensors() if content is None else content, num_bytes=0)


def test_that_a_record_comes_back_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "record.safetensors"
    header = write_record(path, HEADER, tensors())

    read = parse_record(path.read_bytes())

    assert read.header == header
    assert dataclasses.replace(read.header, tensors_digest="") == HEADER
    assert read.header.tensors_digest == digest_tensors(tensors())
    assert read.num_bytes == path.stat().st_size
    assert read.tensors.keys() == tensors().keys()
    for name, tensor in tensors().items():
        assert read.tensors[name].dtype == tensor.dtype
        assert torch.equal(read.tensors[name], tensor)


@pytest.mark.parametrize(
    "dtype",
    [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint32, torch.float8_e4m3fn],
)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (5,)])
def test_that_every_dtype_and_shape_comes_back(
    tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    tensor = torch.ones(shape).to(dtype)

    read = parse_record(written(tmp_path, content={"x": tensor}).read_bytes()).tensors["x"]

    assert read.dtype == dtype
    assert torch.equal(read, tensor)


def test_that_a_record_without_tensors_comes_back(tmp_path: Path) -> None:
    path = written(tmp_path, dataclasses.replace(HEADER, kind="end"), {})

    assert parse_record(path.read_bytes()).tensors == {}


def test_that_the_file_is_plain_safetensors_and_no_pickle(tmp_path: Path) -> None:
    path = written(tmp_path)

    with safe_open(path, framework="pt") as file:
        fields = json.loads(file.metadata()["gradient_bridge"])
    plain = load_file(path)

    assert {**fields, "tensors_digest": ""} == dataclasses.asdict(HEADER)
    assert all(torch.equal(plain[name], tensor) for name, tensor in tensors().items())
    with pytest.raises((pickle.UnpicklingError, ValueError, EOFError, IndexError, KeyError)):
        pickle.loads(path.read_bytes())


def test_that_the_header_is_read_from_the_start_of_a_file(tmp_path: Path) -> None:
    data = written(tmp_path).read_bytes()
    length = int.from_bytes(data[:8], "little")

    assert parse_header(data[: 8 + length]) == parse_record(data).header
    with pytest.raises(PayloadError) as caught:
        parse_header(data[: 8 + length - 1])
    assert caught.value.reason == "truncated"


@pytest.mark.parametrize(
    ("change", "word"),
    [({"run_id": "other"}, "run_id"), ({"job": "receiver"}, "job"), ({"sequence": 4}, "sequence")],
)
def test_that_a_record_in_the_wrong_place_is_alien(change: dict[str, Any], word: str) -> None:
    check_identity(HEADER, run_id="run", job="donor", sequence=3)
    with pytest.raises(PayloadError, match=f"{word} is ") as caught:
        check_identity(dataclasses.replace(HEADER, **change), run_id="run", job="donor", sequence=3)
    assert caught.value.reason == "alien"


def test_that_a_fitting_gradient_passes() -> None:
    check_sum(record(), EXPECTED, "samples")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"a": None}, "'a' is missing"),
        ({"c": torch.zeros(1)}, "'c' is not shared"),
        ({"a": torch.zeros(3, 2)}, r"'a' is torch.float32 \(3, 2\), expected .* \(2, 3\)"),
        ({"a": torch.zeros(6)}, r"\(6,\), expected"),
        ({"a": torch.zeros(2, 3, dtype=torch.float64)}, "torch.float64.*expected torch.float32"),
        ({"a": torch.zeros(2, 3, dtype=torch.bfloat16)}, "expected torch.float32"),
        ({"b": torch.zeros(3)}, "expected torch.float64"),
    ],
)
def test_that_another_schema_is_refused(change: dict[str, Tensor | None], words: str) -> None:
    content = {
        name: tensor for name, tensor in {**tensors(), **change}.items() if tensor is not None
    }
    with pytest.raises(PayloadError, match=words) as caught:
        check_sum(record(content), EXPECTED, "samples")
    assert caught.value.reason == "schema"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_that_a_value_that_is_not_finite_is_refused(value: float) -> None:
    content = tensors()
    content["b"][1] = value

    with pytest.raises(PayloadError) as caught:
        check_sum(record(content), EXPECTED, "samples")
    assert caught.value.reason == "nonfinite"
    assert not all_finite(content.values())


@pytest.mark.parametrize("count", [0.0, -1.0, math.nan, math.inf])
def test_that_an_impossible_count_is_refused(count: float) -> None:
    with pytest.raises(PayloadError) as caught:
        check_sum(record(count=count), EXPECTED, "samples")
    assert caught.value.reason == "count"


def test_that_another_unit_is_refused() -> None:
    with pytest.raises(PayloadError, match="in 'tokens', expected 'samples'") as caught:
        check_sum(record(unit="tokens"), EXPECTED, "samples")
    assert caught.value.reason == "unit"


def test_what_the_digest_depends_on() -> None:
    content = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(2)}
    digest = digest_tensors(content)

    assert digest == digest_tensors(dict(reversed(content.items())))
    assert digest == digest_tensors({**content, "a": content["a"].t().contiguous().t()})
    for change in (
        {"a": content["a"].reshape(3, 2)},
        {"b": torch.zeros(2, dtype=torch.int32)},
        {"b": torch.tensor([0.0, -0.0])},
        {"c": torch.zeros(0)},
    ):
        assert digest != digest_tensors({**content, **change})


def test_the_digest_of_more_than_one_piece() -> None:
    """By hand; the last piece is short, and a later tensor begins a piece of its own."""
    long, short = torch.randn(2**21 + 3), torch.arange(5)
    data = long.numpy().tobytes()
    text = b"2|a|torch.float32|(2097155,)|b|torch.int64|(5,)|"
    for piece in (data[: 2**22], data[2**22 : 2**23], data[2**23 :], short.numpy().tobytes()):
        text += hashlib.sha256(piece).digest()
    assert digest_tensors({"b": short, "a": long}) == hashlib.sha256(text).hexdigest()


def test_in_which_dtype_a_gradient_crosses() -> None:
    assert payload_dtype(torch.bfloat16) is torch.float32
    assert payload_dtype(torch.float16) is torch.float32
    assert payload_dtype(torch.float64) is torch.float64


def test_that_a_rejection_survives_the_way_between_ranks() -> None:
    error = pickle.loads(pickle.dumps(PayloadError("digest", "a detail")))

    assert (error.reason, error.detail, str(error)) == ("digest", "a detail", "a detail [digest]")
