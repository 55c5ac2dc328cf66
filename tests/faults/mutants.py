"""Files that a disk, a stray job or a stranger may leave in the place of a record.

One mutant is made from its number alone, so that a failure can be repeated. Some kinds only change
bytes; the crafted ones (``craft``) carry digests that fit what they say, and lie about the rest.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from tests.unit.keys import KEY, OTHER_KEY
from toolkit.bridge.authentication import UNSIGNED, Signer
from toolkit.bridge.digests import digest_tensors
from toolkit.bridge.payload import Header, write_record

RUN, JOB, SEQUENCE = "run", "donor", 3
EXPECTED = {"a": torch.zeros(64, 32), "b": torch.zeros(33, dtype=torch.float64)}
# What a job that shares these tensors expects at most (`Job._record_bytes`).
LIMIT = 8 * sum(t.numel() for t in EXPECTED.values()) + 1024 * len(EXPECTED) + 2**20
LENGTHS = [
    0,
    1,
    7,
    8,
    2**16,
    2**24,
    2**24 + 1,
    2**31 - 1,
    2**31,
    2**32,
    2**63 - 1,
    2**63,
    2**64 - 1,
]
HUGE = [2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**400]


def header(sequence: int = SEQUENCE, **changes: Any) -> Header:
    plain = Header(
        kind="gradient", run_id=RUN, job=JOB, sequence=sequence, attempt=1, receiver_step=sequence,
        weights_digest=f"weights-{sequence}", head="heads.h2", donor_step=sequence, count=5.0,
        loss=0.25,
    )  # fmt: skip
    return dataclasses.replace(plain, **changes)


def tensors(sequence: int = SEQUENCE) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(sequence)
    return {
        name: torch.randn(like.shape, generator=generator, dtype=like.dtype)
        for name, like in EXPECTED.items()
    }


def record(
    directory: Path,
    signer: Signer,
    sequence: int = SEQUENCE,
    seed: int | None = None,
    **changes: Any,
) -> bytes:
    """The bytes that a job writes."""
    path = directory / "written"
    content = tensors(sequence if seed is None else seed)
    write_record(path, header(sequence, **changes), content, signer)
    data = path.read_bytes()
    path.unlink()
    return data


def craft(
    content: dict[str, Tensor], signer: Signer = UNSIGNED, *, without: str = "", **changes: Any
) -> bytes:
    """A file of these tensors whose digests fit, with header fields of any type and value."""
    fields = dataclasses.asdict(header()) | {"tensors_digest": digest_tensors(content)} | changes
    fields.pop(without, None)
    return save(content, metadata=seal(json.dumps(fields), signer))


def seal(text: str, signer: Signer = UNSIGNED) -> dict[str, str]:
    """The metadata of a file whose header has this text."""
    if signer.has_key:
        proof = {"hmac_sha256": signer.sign("record", text.encode())}
    else:
        proof = {"digest": hashlib.sha256(text.encode()).hexdigest()}
    return {"gradient_bridge": text, **proof}


def split(data: bytes) -> tuple[bytes, bytes]:
    """The JSON header of a safetensors file, and its data."""
    end = 8 + int.from_bytes(data[:8], "little")
    return data[8:end], data[end:]


def join(text: bytes, body: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text + body


Change = Callable[["Originals", random.Random], bytes]


class Originals:
    """What lies in the directories of two runs, and what mutants are made of."""

    def __init__(self, directory: Path, signer: Signer) -> None:
        self.signer = signer
        self.data = record(directory, signer)
        self.neighbours = [record(directory, signer, SEQUENCE + step) for step in (-1, 1)]
        other = Signer(KEY, "another run") if signer.has_key else UNSIGNED
        self.alien = record(directory, other, seed=100, run_id="another run")

    def craft(self, rng: random.Random, content: dict[str, Tensor], **changes: Any) -> bytes:
        """Crafted by who has no key of this run, or any key where there is none."""
        forgers = [UNSIGNED, Signer(OTHER_KEY, RUN), Signer(KEY, "another run")]
        signer = rng.choice(forgers) if self.signer.has_key else UNSIGNED
        return craft(content, signer, **changes)


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


# -- a header of safetensors that lies -----------------------------------------------------------


def length_lie(of: Originals, rng: random.Random) -> bytes:
    true = len(split(of.data)[0])
    lies = [
        *LENGTHS,
        true - 1,
        true + 1,
        true + 8,
        len(of.data),
        len(of.data) - 8,
        rng.getrandbits(64),
    ]
    return (rng.choice(lies) % 2**64).to_bytes(8, "little") + of.data[8:]


def offset_lie(of: Originals, rng: random.Random) -> bytes:
    text, body = split(of.data)
    fields = json.loads(text)
    entry = fields[rng.choice(["a", "b"])]
    key = rng.choice(["data_offsets", "data_offsets", "shape", "dtype"])
    if key == "data_offsets":
        begin, end = entry[key]
        lies: list[Any] = [
            [begin, end + 4], [begin + 4, end], [end, begin], [0, len(body)], [-4, end],
            [begin, 2**64 - 1], [begin, 2**64], [begin], [begin + 0.5, end],
        ]  # fmt: skip
    elif key == "shape":
        lies = [[], [0], [-1], [1] * 65, [2**63, 0], [0, 2**64 - 1], [2**32, 2**32], [2048.0], "a"]
    else:
        lies = ["F16", "F64", "I32", "F8_E8M0", "F4", "C64", "BOOL", "X", None, 1]
    entry[key] = rng.choice([lie for lie in lies if lie != entry[key]])
    return join(json.dumps(fields).encode(), body)


def empty_tensor_lie(of: Originals, rng: random.Random) -> bytes:
    """Tensors of no bytes beside the true ones, of any shape that has a zero."""
    text, body = split(of.data)
    shape = [rng.choice([0, 1, *HUGE]) for _ in range(rng.choice([1, 2, 70]))]
    shape.insert(rng.randrange(len(shape) + 1), 0)
    end = len(body)
    extra = {"c": {"dtype": "F32", "shape": shape, "data_offsets": [end, end]}}
    return join(json.dumps({**json.loads(text), **extra}).encode(), body)


def deep_json(of: Originals, rng: random.Random) -> bytes:
    depth = rng.choice([10, 500, 5_000, 100_000])
    opening, closing = rng.choice([(b"[", b"]"), (b'{"a":', b"}")])
    nested = opening * depth + rng.choice([b"", b"1" + closing * depth])
    text, body = split(of.data)
    whole = b'{"__metadata__":{"gradient_bridge":' + nested + b"}}"
    beside = text.rstrip(b" ")[:-1] + b',"c":' + nested + b"}"
    return join(rng.choice([nested, whole, beside]), body)


def wide_json(of: Originals, rng: random.Random) -> bytes:
    """As much JSON as fits: a little text that becomes many objects."""
    depth = rng.choice([1, 2, 100, 400])
    nested = b"[" * depth + b"]" * depth + b","
    piece = rng.choice([nested, b"{},", b"9,", b'"",', b'"\xc3\xbf",', b'{"a":{}},'])
    room = LIMIT - len(of.data) - 100 if rng.random() < 0.05 else 10_000
    many = b"[" + piece * (room // len(piece)) + b"0]"
    text, body = split(of.data)
    return join(text.rstrip(b" ")[:-1] + b',"c":' + many + b"}", body)


def duplicate_key(of: Originals, rng: random.Random) -> bytes:
    text, body = split(of.data)
    fields = json.loads(text)
    key = rng.choice([*fields])
    metadata = fields["__metadata__"]
    lies: list[Any] = [
        {}, None, fields["a"], fields["b"], dict(reversed(metadata.items())),
        {**fields["a"], "data_offsets": [0, 0], "shape": [0]},
        {**metadata, "gradient_bridge": "{}"},
    ]  # fmt: skip
    more = json.dumps({key: rng.choice(lies)}).encode()[1:-1]
    inner = text.strip()[1:-1]
    parts = [inner, more] if rng.random() < 0.5 else [more, inner]
    return join(b"{" + b",".join(parts) + b"}", body)


def renamed_tensor(of: Originals, rng: random.Random) -> bytes:
    text, body = split(of.data)
    old, new = rng.choice([(b'"a"', b'"A"'), (b'"a"', b'"b"'), (b'"b"', b'"c|"'), (b'"a"', b'""')])
    return join(text.replace(old, new), body)


def other_encoding(of: Originals, rng: random.Random) -> bytes:
    text, body = split(of.data)
    encoding = rng.choice(["utf-16", "utf-16-le", "utf-32", "utf-8-sig"])
    return join(text.decode().encode(encoding), body)


def white_space(of: Originals, rng: random.Random) -> bytes:
    """The same content: only white space and the order of the keys differ."""
    text, body = split(of.data)
    items = list(json.loads(text).items())
    rng.shuffle(items)
    indent = rng.choice([None, 0, 2])
    return join(json.dumps(dict(items), indent=indent).encode() + b" " * rng.randrange(9), body)


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
