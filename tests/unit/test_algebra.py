"""What must hold for any numbers: sums and counts of payloads add, and rescaling is linear."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.unit.jobs import reset
from tests.unit.rescaled import each_setting, two_factors
from tests.unit.test_accumulation import Job
from toolkit.bridge.digests import digest_tensors
from toolkit.bridge.payload import Header, parse_record, write_record
from toolkit.bridge.rescaling import LOSS_REDUCTIONS, LossReduction, RescaleRule

counts = st.integers(1, 10**6)
sums = st.floats(-1e6, 1e6)
weights = st.floats(0.0, 1e3)


@dataclasses.dataclass(frozen=True)
class Part:
    """A sum over samples and their number: one payload, or one side of a step."""

    total: float
    count: float

    def __add__(self, other: Part) -> Part:
        return Part(self.total + other.total, self.count + other.count)


parts = st.builds(Part, sums, counts)


def step(
    rule: RescaleRule, reduction: LossReduction, own: Part, donor: Part, weight: float = 1.0
) -> float:
    own_factor, donor_factor = two_factors(rule, reduction, own.count, donor.count, weight)
    return own_factor * own.total + donor_factor * donor.total


def close(a: float, b: float, *terms: float) -> bool:
    """Equal but for rounding in terms of this size."""
    return abs(a - b) <= 1e-12 * max(abs(term) for term in (a, b, *terms, 1e-300))


@each_setting
@given(own=parts, first=parts, second=parts)
def test_that_a_merged_payload_is_its_parts_by_their_counts(
    rule: RescaleRule, reduction: LossReduction, own: Part, first: Part, second: Part
) -> None:
    """``match`` averages the parts by their counts, ``append`` adds them, ``pool`` shares one n."""
    nothing = Part(0.0, own.count)
    merged = step(rule, reduction, nothing, first + second)
    alone = [step(rule, reduction, nothing, part) for part in (first, second)]
    n = first.count + second.count
    shares = {
        "match": [first.count / n, second.count / n],
        "append": [1.0, 1.0],
        "pool": [(own.count + part.count) / (own.count + n) for part in (first, second)],
    }[rule]
    terms = [share * value for share, value in zip(shares, alone, strict=True)]
    assert close(merged, sum(terms), *terms)


@each_setting
@given(own=parts, donor=parts, weight=weights, scale=st.floats(-1e3, 1e3))
def test_that_a_step_is_linear_in_both_sums_and_in_lambda(
    rule: RescaleRule,
    reduction: LossReduction,
    own: Part,
    donor: Part,
    weight: float,
    scale: float,
) -> None:
    own_part = step(rule, reduction, own, Part(0.0, donor.count), weight)
    donor_part = step(rule, reduction, Part(0.0, own.count), donor, weight)
    together = step(rule, reduction, own, donor, weight)
    assert close(together, own_part + donor_part, own_part, donor_part)
    scaled = Part(scale * own.total, own.count), Part(scale * donor.total, donor.count)
    terms = scale * own_part, scale * donor_part
    assert close(step(rule, reduction, *scaled, weight), scale * together, *terms)
    unit = step(rule, reduction, Part(0.0, own.count), donor, 1.0)
    assert close(donor_part, weight * unit)


@each_setting
@given(own=parts, donor=parts, times=st.integers(2, 50))
def test_that_both_batches_many_times_over_are_the_same_mean_and_as_many_sums(
    rule: RescaleRule, reduction: LossReduction, own: Part, donor: Part, times: int
) -> None:
    once = step(rule, reduction, own, donor)
    many = [Part(times * part.total, times * part.count) for part in (own, donor)]
    factor = times if reduction == "sum" else 1
    own_factor, donor_factor = two_factors(rule, reduction, own.count, donor.count)
    terms = factor * own_factor * own.total, factor * donor_factor * donor.total
    assert close(step(rule, reduction, many[0], many[1]), factor * once, *terms)


@settings(deadline=None, max_examples=30)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any),
    cut=st.integers(0, 5),
    reduction=st.sampled_from(LOSS_REDUCTIONS),
    accumulation=st.integers(1, 6),
)
def test_that_sums_and_counts_of_windows_add(
    sizes: list[int], cut: int, reduction: LossReduction, accumulation: int
) -> None:
    """All micro-batches in one window, or in two whose payloads are merged, in either order."""
    reset()
    job = Job(reduction, accumulation=accumulation)
    batches, bounds = job.batches(sizes), [(0, len(sizes)), (0, cut), (cut, len(sizes))]
    found = []
    for start, end in bounds:
        job.optimizer.zero_grad()
        total, count = [torch.zeros_like(p) for p in job.model.parameters()], 0.0
        if batches[start:end]:
            window = job.window_of(batches[start:end])
            total, count = job.sums(window), window.count
        found.append((total, count))
    reset()
    (whole, n), (first, n_1), (second, n_2) = found
    assert n == n_1 + n_2 == sum(sizes)
    for merged in (
        [a + b for a, b in zip(first, second, strict=True)],
        [b + a for a, b in zip(first, second, strict=True)],
    ):
        torch.testing.assert_close(merged, whole, rtol=1e-12, atol=1e-13)


names = st.text("abc.01", min_size=1, max_size=6)
dtypes = st.sampled_from([torch.float64, torch.float32, torch.bfloat16])


@st.composite
def payloads(draw: st.DrawFn) -> dict[str, Tensor]:
    """Some tensors, NaN and infinities among them."""
    tensors = {}
    for name in draw(st.sets(names, min_size=1, max_size=4)):
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        size = math.prod(shape)
        values = draw(st.lists(st.floats(width=32), min_size=size, max_size=size))
        tensors[name] = torch.tensor(values).reshape(shape).to(draw(dtypes))
    return tensors


@settings(deadline=None)
@given(tensors=payloads(), count=st.floats(0, 1e9), step_number=st.integers(0, 2**31))
def test_that_every_payload_comes_back_bit_by_bit(
    tensors: dict[str, Tensor], count: float, step_number: int
) -> None:
    header = Header(
        kind="gradient", run_id="run", job="donor", sequence=1, attempt=1,
        receiver_step=step_number, weights_digest="w", count=count,
    )  # fmt: skip
    with TemporaryDirectory() as directory:
        path = Path(directory, "record.safetensors")
        written = write_record(path, header, tensors)
        record = parse_record(path.read_bytes())
    assert record.header == written
    assert (record.header.count, record.header.receiver_step) == (count, step_number)
    assert digest_tensors(record.tensors) == written.tensors_digest == digest_tensors(tensors)


@given(tensors=payloads(), data=st.data())
def test_that_one_changed_bit_changes_the_digest(
    tensors: dict[str, Tensor], data: st.DataObject
) -> None:
    assume(any(tensor.numel() for tensor in tensors.values()))
    before = digest_tensors(tensors)
    assert digest_tensors(dict(reversed(tensors.items()))) == before
    name = data.draw(st.sampled_from([n for n, t in tensors.items() if t.numel()]))
    raw = tensors[name].reshape(-1).view(torch.uint8)
    position = data.draw(st.integers(0, len(raw) - 1))
    raw[position] ^= 1 << data.draw(st.integers(0, 7))
    assert digest_tensors(tensors) != before
