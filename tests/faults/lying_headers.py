"""Files whose safetensors header lies about lengths, places, names or itself."""

from __future__ import annotations

import json
import random
from typing import Any

from tests.faults.originals import HUGE, LIMIT, Originals, join, split

LENGTHS = [
    0, 1, 7, 8, 2**16, 2**24, 2**24 + 1, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1,
]  # fmt: skip


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
