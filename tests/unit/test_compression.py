"""Compressed payloads: what is sent and what is left out add up, and malformed ones are refused."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from toolkit.bridge.compression import (
    ErrorFeedback,
    compressed_bytes,
    decode,
    largest,
    round_values,
)
from toolkit.bridge.errors import PayloadError

LIKE = {
    "a": torch.zeros(7, 5, dtype=torch.float64),
    "b.bias": torch.zeros((), dtype=torch.float64),
    "c": torch.zeros(20, dtype=torch.float64),
}
SIZE = 56
COUNTS = (4.0, 9.0, 1.0, 32.0, 5.0, 7.5)


def build_sum(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(like.shape, generator=generator, dtype=like.dtype)
        for name, like in LIKE.items()
    }


def flat(tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].reshape(-1) for name in sorted(tensors)])


class Pair:
    """A donor's error feedback, and a receiver that adds up the means that it applies."""

    def __init__(self, ratio: float = 0.1) -> None:
        self.feedback = ErrorFeedback(ratio)
        self.applied = torch.zeros(SIZE, dtype=torch.float64)
        self.sequence = -1
        self.rejected: set[int] = set()

    def send(self, sums: Mapping[str, Tensor], count: float, is_rejected: bool = False) -> Tensor:
        """One payload; what the receiver reads of it."""
        self.skip()
        sent, residual = self.feedback.encode(sums, count)
        self.sequence += 1
        self.feedback.note_sent(self.sequence, residual)
        read = flat(decode(sent, "topk", LIKE))
        if is_rejected:
            self.rejected.add(self.sequence)
        else:
            self.applied += read / count
        return read

    def skip(self) -> None:
        self.feedback.settle(self.rejected.__contains__)

    @property
    def residual(self) -> Tensor:
        """After the newest payload, as a checkpoint has it."""
        tensors, sequence = self.feedback.state()
        is_refused = sequence in self.rejected or "newest" not in tensors
        return tensors.get("residual" if is_refused else "newest", torch.zeros(SIZE).double())


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert float((found - expected).abs().max()) <= 1e-13


def means(number: int) -> Tensor:
    """The sum of the first means, S / n, written out."""
    total = torch.zeros(SIZE, dtype=torch.float64)
    for step in range(number):
        total += flat(build_sum(step)) / COUNTS[step]
    return total


def test_that_what_is_applied_and_what_is_left_out_are_all_means_whatever_the_counts() -> None:
    pair = Pair()
    for step, count in enumerate(COUNTS):
        pair.send(build_sum(step), count)
        assert_close(pair.applied + pair.residual, means(step + 1))
    assert float(pair.residual.norm()) == pytest.approx(pair.feedback.residual_norm)
    assert float(pair.residual.norm()) > 0.5 * float(means(1).norm()), "something is left out"


def test_that_a_payload_is_the_largest_of_its_sum_and_of_what_was_left_out() -> None:
    pair = Pair()
    left = torch.zeros(SIZE, dtype=torch.float64)
    for step, count in enumerate(COUNTS):
        wanted = flat(build_sum(step)) + count * left
        places = sorted(range(SIZE), key=lambda i: -abs(float(wanted[i])))[: math.ceil(SIZE / 10)]
        expected = torch.zeros(SIZE, dtype=torch.float64)
        for place in places:
            expected[place] = float(torch.tensor(float(wanted[place])).bfloat16())
        assert torch.equal(pair.send(build_sum(step), count), expected)
        left = (wanted - expected) / count


def test_that_a_payload_computed_again_begins_where_the_rejected_one_began() -> None:
    pair, twin = Pair(), Pair()
    for each in (pair, twin):
        each.send(build_sum(0), COUNTS[0])
    refused = pair.send(build_sum(1), COUNTS[1], is_rejected=True)
    assert torch.equal(pair.send(build_sum(1), COUNTS[1]), refused)
    twin.send(build_sum(1), COUNTS[1])
    assert torch.equal(pair.residual, twin.residual)
    assert_close(pair.applied + pair.residual, means(2))


def test_that_a_rejection_and_a_skip_leave_the_residual_as_it_was() -> None:
    pair, twin = Pair(), Pair()
    for each in (pair, twin):
        each.send(build_sum(0), COUNTS[0])
    pair.send(build_sum(5), COUNTS[1], is_rejected=True)
    pair.skip()
    pair.skip()
    for each in (pair, twin):
        each.send(build_sum(1), COUNTS[1])
    assert torch.equal(pair.applied, twin.applied)
    assert torch.equal(pair.residual, twin.residual)


def test_that_a_payload_that_could_not_be_written_is_the_same_at_the_next_try() -> None:
    pair = Pair()
    pair.send(build_sum(0), COUNTS[0])
    found = []
    for _ in range(2):
        pair.skip()
        found.append(pair.feedback.encode(build_sum(1), COUNTS[1]))
    (first, left), (second, left_again) = found
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(left, left_again)


@pytest.mark.parametrize("is_rejected", [False, True])
def test_that_a_restart_goes_on_bitwise(is_rejected: bool) -> None:
    pair, twin = Pair(), Pair()
    for each in (pair, twin):
        each.send(build_sum(0), COUNTS[0])
        each.send(build_sum(1), COUNTS[1], is_rejected)
    tensors, sequence = pair.feedback.state()
    pair.feedback = ErrorFeedback(0.1)
    pair.feedback.load_state({name: t.clone() for name, t in tensors.items()}, sequence)
    for each in (pair, twin):
        each.send(build_sum(2), COUNTS[2])
    assert torch.equal(pair.applied, twin.applied)
    assert torch.equal(pair.residual, twin.residual)


def test_that_values_beyond_bfloat16_stay_finite() -> None:
    pair = Pair()
    largest_float = {name: torch.full_like(t, torch.finfo(torch.float32).max) for name, t in
                     LIKE.items()}  # fmt: skip
    assert bool(pair.send(largest_float, 1.0).isfinite().all())
    assert bool(pair.residual.isfinite().all())


@pytest.mark.parametrize("number", [1, 3, 250, 999, 1000])
@pytest.mark.parametrize("kind", ["noise", "ties", "zeros", "a peak", "columns"])
def test_that_the_largest_are_found_exactly(
    kind: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("toolkit.bridge.compression._SAMPLED", 50)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1000, generator=generator)
    values = {
        "noise": noise,
        "ties": noise.round(),
        "zeros": torch.zeros(1000),
        "a peak": torch.arange(1000.0) // 998,
        "columns": noise * (torch.arange(1000) % 20 == 3),
    }[kind]
    order = sorted(range(1000), key=lambda place: (-abs(float(values[place])), place))
    assert largest(values, number).tolist() == sorted(order[:number])


def test_that_rounding_is_within_its_bound() -> None:
    sums = build_sum(0)
    read = flat(decode(round_values(sums), "bf16", LIKE))
    relative = ((read - flat(sums)) / flat(sums)).abs()
    assert 2**-11 < float(relative.max()) <= 2**-8


def test_that_mixed_dtypes_come_back() -> None:
    sums = {**build_sum(0), "d": torch.ones(3)}
    like = {**LIKE, "d": torch.zeros(3, device="meta")}
    for sent, compression in (
        (ErrorFeedback(1.0).encode(sums, 2.0)[0], "topk"),
        (round_values(sums), "bf16"),
    ):
        read = decode(sent, compression, like)
        assert {name: (t.dtype, t.shape) for name, t in read.items()} == {
            name: (t.dtype, t.shape) for name, t in sums.items()
        }
        assert float((flat(read) - flat(sums)).abs().max()) <= 0.02


def test_the_bytes_that_are_sent() -> None:
    tensors = [torch.zeros(50, 20), torch.zeros(10)]
    assert compressed_bytes(tensors, "none", 0.5) == 4040
    assert compressed_bytes(tensors, "bf16", 0.5) == 2020
    assert compressed_bytes(tensors, "topk", 0.01) == 11 * 4 + 4
    sent, _ = ErrorFeedback(0.01).encode(dict(zip("ab", tensors, strict=True)), 1.0)
    assert sum(t.numel() * t.itemsize for t in sent.values()) == 11 * 4 + 4


BLOCK = 2**16
LARGE = {"a": torch.zeros(BLOCK + 7, device="meta"), "b": torch.zeros(BLOCK - 3, device="meta")}


def topk(places: list[int], counts: list[int], /, **changes: Tensor) -> dict[str, Tensor]:
    return {
        "values": torch.ones(len(places), dtype=torch.bfloat16),
        "places": (torch.tensor(places, dtype=torch.long) - 2**15).to(torch.int16),
        "counts": torch.tensor(counts, dtype=torch.int32),
        **changes,
    }


def test_that_places_are_within_blocks() -> None:
    read = decode(topk([0, 65535, 0, 6, 7, 3], [2, 3, 1]), "topk", LARGE)
    assert read["a"].nonzero().flatten().tolist() == [0, 65535, 65536, 65542]
    assert read["b"].nonzero().flatten().tolist() == [0, 65532]
    generator = torch.Generator().manual_seed(0)
    sums = {name: torch.randn(like.shape, generator=generator) for name, like in LARGE.items()}
    sent, residual = ErrorFeedback(0.3).encode(sums, 1.0)
    assert torch.equal(flat(decode(sent, "topk", LARGE)) + residual, flat(sums))
    empty = decode(topk([], [0, 0, 0]), "topk", LARGE)
    assert not any(bool(tensor.any()) for tensor in empty.values())


@pytest.mark.parametrize(
    ("compression", "tensors", "reason", "words"),
    [
        ("topk", topk([0, 4], [1, 0, 1]), "malformed", "place 131076 of 131076"),
        ("topk", topk([3, 3], [0, 2, 0]), "malformed", "do not ascend"),
        ("topk", topk([4, 3], [2, 0, 0]), "malformed", "do not ascend"),
        ("topk", topk([3, 4], [1, 0, 0]), "malformed", "counts 1 of 2"),
        ("topk", topk([3, 4], [2**31 - 1] * 3), "malformed", "counts 6442450941 of 2"),
        ("topk", topk([3, 4], [3, -1, 0]), "malformed", "counts 2 of 2"),
        ("topk", topk([3], [1, 0]), "schema", r"\(2,\).*expected.*\(3,\)"),
        ("topk", topk([3], [1, 0, 0], values=torch.ones(2).bfloat16()), "schema", r"\(2,\)"),
        ("topk", topk([3], [1, 0, 0], values=torch.ones(1)), "schema", "torch.float32"),
        ("topk", topk([3], [1, 0, 0], values=torch.ones(()).bfloat16()), "schema", r"\(\)"),
        ("topk", topk([3], [1, 0, 0], places=torch.ones(1).int()), "schema", "torch.int32"),
        ("topk", topk([3], [1, 0, 0], counts=torch.tensor([1, 0, 0])), "schema", "torch.int64"),
        ("topk", topk([3], [1, 0, 0], extra=torch.ones(1)), "schema", "'extra'"),
        ("topk", {"values": torch.ones(1).bfloat16()}, "schema", "expected.*'places'"),
        ("topk", build_sum(0), "schema", "expected"),
        ("bf16", build_sum(0), "schema", "'a' of a bf16 payload is torch.float64"),
    ],
)
def test_that_what_no_donor_encodes_is_refused(
    compression: str, tensors: dict[str, Tensor], reason: str, words: str
) -> None:
    with pytest.raises(PayloadError, match=words) as caught:
        decode(tensors, compression, LARGE)
    assert caught.value.reason == reason
