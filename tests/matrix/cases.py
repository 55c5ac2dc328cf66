"""Which settings the matrix trains: every pair of values that can meet.

``rows.csv`` holds the rows; ``python -m tests.matrix.cases`` generates them anew.
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from tests.matrix.setting import Setting, Side, from_json

ROWS = Path(__file__).with_name("rows.csv")
NUM_CANDIDATES = 100  # of each row, of which one is taken

SIDE: dict[str, list[Any]] = {
    "ranks": [1, 2, 3],
    "batches": ["ragged", "last short", "drifting", "empty", "padded"],
    "accumulation": [1, 3],
    "precision": ["no", "bf16", "fp16"],
    "forward": ["plain", "checkpointed", "compiled"],
    "wrapper": ["ddp", "static_graph", "bucket_view", "fsdp2", "none"],
}
COMMON: dict[str, list[Any]] = {
    "dtype": ["float64", "float32"],
    "loss_reduction": ["mean", "sum"],
    "unit": ["samples", "tokens", "weights"],
    "optimizer": ["sgd", "momentum", "nesterov", "adamw foreach", "adamw fused", "adafactor"],
    "clip": [False, True],
    "weight_decay": [False, True],
    "schedule": [False, True],
    "norm": ["no", "layer"],
    "dropout": ["no", "by sample"],
    "tied": ["no", "backbone", "head"],
    "frozen": ["no", "receiver", "donor"],
    "rescale": ["match", "append", "pool"],
    "scope": ["all", "head"],
    "ema": [False, True],
}
DIMENSIONS: dict[str, list[Any]] = {
    **{f"receiver.{name}": values for name, values in SIDE.items()},
    **{f"donor.{name}": values for name, values in SIDE.items()},
    **COMMON,
}
Row = dict[str, Any]  # some dimensions with a value each
Pair = tuple[tuple[str, Any], tuple[str, Any]]  # two dimensions with a value each, by name

# Why some values cannot meet. A function sees the values of the dimensions that it names.
EXCLUSIONS: list[tuple[str, tuple[str, ...], Callable[..., bool]]] = [
    (
        "pool is a mean over both batches and refused for a sum loss",
        ("rescale", "loss_reduction"),
        lambda rescale, reduction: rescale == "pool" and reduction == "sum",
    ),
    (
        "append divides by the receiver's samples and is refused where a step has none",
        (
            *("rescale", "loss_reduction"),
            *("receiver.batches", "receiver.ranks", "receiver.accumulation"),
        ),
        lambda rescale, reduction, batches, ranks, accumulation: (
            rescale == "append"
            and reduction == "mean"
            and batches == "empty"
            and ranks * accumulation == 1
        ),
    ),
    (
        "torch's Adafactor fails on sharded parameters; a donor's does not step",
        ("optimizer", "receiver.wrapper"),
        lambda optimizer, wrapper: optimizer == "adafactor" and wrapper == "fsdp2",
    ),
    *(
        exclusion
        for role in ("receiver", "donor")
        for exclusion in (
            (
                "autocast leaves float64 as it is",
                ("dtype", f"{role}.precision"),
                lambda dtype, precision: dtype == "float64" and precision == "bf16",
            ),
            (
                "one rank has none to drift from, and nothing is padded for it",
                (f"{role}.ranks", f"{role}.batches"),
                lambda ranks, batches: ranks == 1 and batches in ("drifting", "padded"),
            ),
            (
                "one rank has no DDP, and nobody to share parameters with",
                (f"{role}.ranks", f"{role}.wrapper"),
                lambda ranks, wrapper: ranks == 1 and wrapper not in ("ddp", "none"),
            ),
            (
                "FSDP2 gathers in every micro-step: windows of unequal length would never end",
                (f"{role}.batches", f"{role}.accumulation", f"{role}.wrapper"),
                lambda batches, accumulation, wrapper: (
                    batches == "drifting" and accumulation > 1 and wrapper == "fsdp2"
                ),
            ),
            (
                "Accelerate makes float32 of what FSDP2 shards in mixed precision",
                ("dtype", f"{role}.precision", f"{role}.wrapper"),
                lambda dtype, precision, wrapper: (
                    dtype == "float64" and precision != "no" and wrapper == "fsdp2"
                ),
            ),
            (
                "static_graph fails in torch where some micro-steps do not synchronise",
                (f"{role}.accumulation", f"{role}.wrapper"),
                lambda accumulation, wrapper: accumulation > 1 and wrapper == "static_graph",
            ),
            (
                "Accelerate casts in the forward of a prepared model only",
                (f"{role}.precision", f"{role}.wrapper"),
                lambda precision, wrapper: precision != "no" and wrapper == "none",
            ),
        )
    ),
]  # fmt: skip


# What failed once, each as it did, in uneven batches as all.
EXTRA: dict[str, Setting] = {
    # A compiled backbone made other names of its parameters, and another schema.
    "compiled receiver, plain donor": Setting(receiver=Side(forward="inductor")),
    # A layer that both jobs froze moved by weight decay, on the donor's zeros.
    "frozen layer under weight decay": Setting(frozen="both", weight_decay=True),
    # A short last window, where the divisor stays the configured number of micro-steps.
    "short windows of four": Setting(
        receiver=Side(ranks=2, accumulation=4), donor=Side(ranks=2, accumulation=4)
    ),
    # Tokens counted by rank: each rank's mean had the same weight.
    "tokens by rank": Setting(
        receiver=Side(ranks=2), donor=Side(ranks=2), unit="tokens", rescale="pool", optimizer="sgd"
    ),
}


# What cannot equal joint training: how far off it is.
DISTANCES: dict[str, Setting] = {
    f"{what}, {ranks}": Setting(
        receiver=Side(ranks=number, batches="last short"),
        donor=Side(ranks=number, batches="last short"),
        optimizer="sgd",
        norm=norm,
        dropout=dropout,
    )
    for what, norm, dropout in (("BatchNorm", "batch", "no"), ("Dropout", "no", "stream"))
    for number, ranks in ((1, "one rank each"), (2, "two ranks each"))
}


def is_possible(row: Row, about: str = "") -> bool:
    """Whether no exclusion (of those about one dimension) forbids what ``row`` holds so far."""
    return not any(
        all(name in row for name in names) and forbids(*(row[name] for name in names))
        for _, names, forbids in EXCLUSIONS
        if about in ("", *names)
    )


def generate() -> list[Row]:
    """Rows in which every two values that can meet do: once in float64, once more in float32."""
    return [row for dtype in COMMON["dtype"] for row in cover([], DIMENSIONS | {"dtype": [dtype]})]


def cover(rows: list[Row], dimensions: dict[str, list[Any]]) -> list[Row]:
    """Further rows, so that with ``rows`` every two values that can meet do.

    Greedy, as in Cohen et al., "The AETG System" (1997): each row begins with a pair that is
    missing, and of some candidates with the other dimensions in different orders the one that
    adds the most is taken.
    """
    missing = set(missing_pairs(rows, dimensions))
    random, added = Random(0), []
    while missing:
        start = min(missing, key=repr)
        fills = [_fill(start, missing, dimensions, random) for _ in range(NUM_CANDIDATES)]
        added.append(max(fills, key=lambda row: len(missing.intersection(_pairs(row)))))
        missing.difference_update(_pairs(added[-1]))
    return added


def _fill(start: Pair, missing: set[Pair], dimensions: dict[str, list[Any]], random: Random) -> Row:
    row: Row = {**_fixed(dimensions), **dict(start)}
    others = [name for name in dimensions if name not in row]
    for name in random.sample(others, len(others)):
        possible = [value for value in dimensions[name] if is_possible(row | {name: value}, name)]
        gains = [
            sum(_pair((name, value), known) in missing for known in row.items())
            for value in possible
        ]
        row[name] = random.choice(
            [v for v, g in zip(possible, gains, strict=True) if g == max(gains)]
        )
    return {name: row[name] for name in DIMENSIONS}


def _fixed(dimensions: dict[str, list[Any]]) -> Row:
    return {name: values[0] for name, values in dimensions.items() if len(values) == 1}


def _pair(first: tuple[str, Any], second: tuple[str, Any]) -> Pair:
    return (first, second) if first[0] < second[0] else (second, first)


def _pairs(row: Row) -> list[Pair]:
    return [_pair(first, second) for first, second in itertools.combinations(row.items(), 2)]


def missing_pairs(rows: list[Row], dimensions: dict[str, list[Any]] = DIMENSIONS) -> list[Pair]:
    """Pairs of values that can meet, beside those without a choice, and do not."""
    met = {pair for row in rows for pair in _pairs(row)}
    return [
        pair
        for (a, a_values), (b, b_values) in itertools.combinations(dimensions.items(), 2)
        for x, y in itertools.product(a_values, b_values)
        if is_possible(_fixed(dimensions) | dict(pair := _pair((a, x), (b, y)))) and pair not in met
    ]


def read_rows() -> list[Row]:
    """The rows as they were generated, so that a case keeps its number."""
    texts = {name: {str(value): value for value in DIMENSIONS[name]} for name in DIMENSIONS}
    with ROWS.open(newline="") as file:
        return [
            {name: texts[name][text] for name, text in row.items()} for row in csv.DictReader(file)
        ]


def write_rows() -> None:
    """Generate them anew, after a change of the dimensions."""
    with ROWS.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(DIMENSIONS), lineterminator="\n")
        writer.writeheader()
        writer.writerows(generate())


def setting_of(row: Row, seed: int) -> Setting:
    """The setting with the values of a full row."""
    sides = {
        role: {n.partition(".")[2]: v for n, v in row.items() if n.startswith(f"{role}.")}
        for role in ("receiver", "donor")
    }
    return from_json({**sides, **{n: v for n, v in row.items() if "." not in n}, "seed": seed})


def row_of(setting: Setting) -> Row:
    """The inverse of :func:`setting_of`."""
    fields = dataclasses.asdict(setting)
    sides = {
        f"{role}.{name}": fields[role][name] for role in ("receiver", "donor") for name in SIDE
    }
    return {**sides, **{name: fields[name] for name in COMMON}}


if __name__ == "__main__":
    write_rows()
