"""Files that a disk, a stray job or a stranger may leave in the place of a record.

One mutant is made from its number alone, so that a failure can be repeated. Some kinds only change
bytes; crafted ones (``Originals.craft``) carry digests that fit what they say, and lie about the
rest.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.faults.lying_headers import (
    deep_json,
    duplicate_key,
    empty_tensor_lie,
    length_lie,
    offset_lie,
    other_encoding,
    renamed_tensor,
    white_space,
    wide_json,
)
from tests.faults.originals import HUGE, SEQUENCE, Change, Originals, header, join, split, tensors
from toolkit.bridge.digests import digest_tensors
from toolkit.bridge.payload import Header

# -- bytes that change ---------------------------------------------------------------------------


def truncated(of: Originals, rng: random.Random) -> bytes:
    cut = len(of.data) * rng.randrange(16) // 16
    return of.data[: max(0, cut - rng.choice([0, 0, 1, 7]))]


def one_byte_short(of: Originals, rng: random.Random) -> bytes:
    return of.data[: -rng.randint(1, 16)]


def extended(of: Originals, rng: random.Random) -> bytes:
    return of.data + rng.choice([b"\0", rng.randbytes(rng.randint(1, 5000)), of.data])


def flipped(data: bytes, rng: random.Random, start: int, end: int) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 8])):
        changed[rng.randrange(start, end)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def flipped_header(of: Originals, rng: random.Random) -> bytes:
    return flipped(of.data, rng, 0, 8 + len(split(of.data)[0]))


def flipped_data(of: Originals, rng: random.Random) -> bytes:
    return flipped(of.data, rng, 8 + len(split(of.data)[0]), len(of.data))


def zeroed(of: Originals, rng: random.Random) -> bytes:
    page = rng.choice([16, 512, 4096])
    start = rng.randrange(len(of.data) // page) * page
    return of.data[:start] + bytes(page) + of.data[start + page :]


def swapped_halves(of: Originals, rng: random.Random) -> bytes:
    middle = rng.choice([len(of.data) // 2, rng.randrange(1, len(of.data))])
    return of.data[middle:] + of.data[:middle]


def swapped_pages(of: Originals, rng: random.Random) -> bytes:
    size = rng.choice([8, 512, 4096])
    pages = [of.data[start : start + size] for start in range(0, len(of.data), size)]
    first, second = rng.sample(range(len(pages)), 2)
    pages[first], pages[second] = pages[second], pages[first]
    return b"".join(pages)


def swapped_payload(of: Originals, rng: random.Random) -> bytes:
    return join(split(of.data)[0], split(rng.choice([*of.neighbours, of.alien]))[1])


def spliced(of: Originals, rng: random.Random) -> bytes:
    other = rng.choice([*of.neighbours, of.alien])
    cut = rng.randrange(1, len(of.data))
    return of.data[:cut] + other[cut:]


def noise(of: Originals, rng: random.Random) -> bytes:
    data = rng.randbytes(rng.choice([0, 1, 7, 8, 9, 100, 5000]))
    return data if rng.random() < 0.5 else join(data, b"")


# -- valid files that are not this record ----------------------------------------------------------


def another_runs(of: Originals, rng: random.Random) -> bytes:
    return of.alien


def another_number(of: Originals, rng: random.Random) -> bytes:
    """A replayed record, or one of the future."""
    return rng.choice(of.neighbours)


def wrong_place(of: Originals, rng: random.Random) -> bytes:
    changes: list[dict[str, Any]] = [
        {"run_id": "another run"}, {"run_id": ""}, {"job": "receiver"}, {"job": "east"},
        {"sequence": -1}, {"sequence": rng.choice(HUGE)},
        {"sequence": SEQUENCE + rng.randint(1, 9)},
    ]  # fmt: skip
    return of.craft(rng, tensors(), **rng.choice(changes))


def wrong_field(of: Originals, rng: random.Random) -> bytes:
    name = rng.choice([field.name for field in dataclasses.fields(Header)])
    if rng.random() < 0.2:
        return of.craft(rng, tensors(), without=name)
    valid = getattr(header(), name)
    values = [None, True, [], {}, "5", 5, 0.5, math.nan, [[1]], {"a": "b"}, {"a": 10**400}, 10**400,
              "\0", "\ud800", "x" * 100_000]  # fmt: skip
    wrong = [value for value in values if type(value) is not type(valid)]
    if name in ("loss", "count"):  # numbers of either type are right, and so is no loss
        wrong = [value for value in wrong if (value is not None and value != 5) or value is True]
    return of.craft(rng, tensors(), **{name: rng.choice(wrong)})


def wrong_count(of: Originals, rng: random.Random) -> bytes:
    count = rng.choice([0.0, -0.0, -1.0, 0, math.nan, math.inf, -math.inf, 10**309, 10**4000])
    return of.craft(rng, tensors(), count=count)


def wrong_unit(of: Originals, rng: random.Random) -> bytes:
    return of.craft(rng, tensors(), unit=rng.choice(["tokens", "", "Samples", "samples\0"]))


def wrong_version(of: Originals, rng: random.Random) -> bytes:
    return of.craft(rng, tensors(), format_version=rng.choice([0, 2, 4, -3, 3.0, "3", None, True]))


def wrong_tensors(of: Originals, rng: random.Random) -> bytes:
    content: dict[str, Tensor] = tensors()
    name = rng.choice(["a", "b"])
    tensor = content[name]
    changes: list[Callable[[], object]] = [
        lambda: content.pop(name),
        lambda: content.clear(),
        lambda: content.update(c=torch.zeros(rng.choice([0, 1, 3]))),
        lambda: content.update({name: tensor.flatten()[:-1].clone()}),
        lambda: content.update({name: tensor[None].clone()}),
        lambda: content.update({name: tensor.to(rng.choice([torch.float16, torch.bfloat16]))}),
        lambda: content.update({name: tensor.to(rng.choice([torch.int64, torch.bool]))}),
        lambda: content.update(a=torch.zeros(32, 64)),
        lambda: content.update({name.upper(): content.pop(name)}),
        lambda: content.update(a=content["b"], b=content["a"]),
    ]
    rng.choice(changes)()
    return of.craft(rng, content)


def not_finite(of: Originals, rng: random.Random) -> bytes:
    content = tensors()
    flat = content[rng.choice(["a", "b"])].view(-1)
    flat[rng.randrange(len(flat))] = rng.choice([math.nan, math.inf, -math.inf])
    return of.craft(rng, content)


def forged(of: Originals, rng: random.Random) -> bytes:
    """Right in every respect but the signature; without a key, in its digests."""
    content = tensors()
    content["b"][rng.randrange(33)] += 1.0
    if of.signer.has_key:
        return of.craft(rng, content)
    wrong = rng.choice([digest_tensors(tensors()), "", "0" * 64])
    return of.craft(rng, content, tensors_digest=wrong)


CHANGES: list[Change] = [
    truncated, one_byte_short, extended, flipped_header, flipped_data, zeroed, swapped_halves,
    swapped_pages, swapped_payload, spliced, noise, length_lie, offset_lie, empty_tensor_lie,
    deep_json, wide_json, duplicate_key, renamed_tensor, other_encoding, white_space, another_runs,
    another_number, wrong_place, wrong_field, wrong_count, wrong_unit, wrong_version,
    wrong_tensors, not_finite, forged,
]  # fmt: skip
# Those that may leave the content as it is; see `test_mutated_payloads`.
MAY_BE_EQUAL = {
    "white_space", "flipped_header", "duplicate_key", "swapped_pages", "spliced", "other_encoding",
    "zeroed",
}  # fmt: skip


def mutant(of: Originals, number: int) -> tuple[str, bytes]:
    """Mutant ``number``: its kind and its bytes."""
    change = CHANGES[number % len(CHANGES)]
    return change.__name__, change(of, random.Random(number))
