"""Bytes and round trips per step, by arithmetic: what an exchange asks of the shared disk.

Headers (a few hundred bytes a tensor), heartbeats and acknowledgements are left out. In ``auto``
the traffic is that of ``gradient`` while a donor is there.
"""

from __future__ import annotations

import argparse
import dataclasses

import torch
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from toolkit.benchmarks.timing import write_figures
from toolkit.bridge.compression import Compression, compressed_bytes
from toolkit.bridge.config import BridgeConfig
from toolkit.bridge.payload import payload_dtype

# What is shown: the settings that decide, and the exchange's name for people.
SETTINGS: dict[str, BridgeConfig] = {
    "lockstep": BridgeConfig(exchange="gradient"),
    "1 step late": BridgeConfig(exchange="gradient", max_staleness=1),
    "lockstep, scope head": BridgeConfig(exchange="gradient", scope="head"),
    "delta, 8 local steps": BridgeConfig(exchange="delta", local_steps=8),
    "delta, 32 local steps": BridgeConfig(exchange="delta", local_steps=32),
    "distill, every 25 steps": BridgeConfig(exchange="distill", publish_every=25),
    "head": BridgeConfig(exchange="head"),
}
COMPRESSIONS: tuple[Compression, ...] = ("none", "bf16", "topk")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Traffic:
    """What crosses in one optimizer step of the receiver, on average over many.

    Attributes:
        receiver_bytes: that the receiver writes, and each donor reads.
        donor_bytes: that a donor writes, and the receiver reads.
        receiver_records: files that the receiver writes.
        donor_records: files that a donor writes.
        waits: how often the receiver waits for a donor's answer to what it wrote.
    """

    receiver_bytes: float
    donor_bytes: float
    receiver_records: float
    donor_records: float
    waits: float


def traffic_of(
    config: BridgeConfig, num_backbone: int, num_head: int, dtype: torch.dtype = torch.float32
) -> Traffic:
    """The traffic of a receiver and one donor.

    Args:
        config: what crosses, and how often; ``publish_every`` in steps.
        num_backbone: elements of the backbone's tensors.
        num_head: of the head's.
        dtype: of the weights.
    """
    weights = (num_backbone + num_head) * dtype.itemsize
    num_elements = num_head + (num_backbone if config.scope == "all" else 0)
    like = torch.empty(num_elements, dtype=payload_dtype(dtype), device="meta")
    payload = compressed_bytes([like], config.compression, config.topk_ratio)
    every = config.local_steps if config.exchange == "delta" else config.publish_every
    assert isinstance(every, int)
    return Traffic(
        receiver_bytes=weights / every if config.follows else 0,
        donor_bytes=(weights if config.exchange == "distill" else payload) / every,
        receiver_records=1 / every if config.follows else 0,
        donor_records=1 / every,
        waits=1 / every if config.follows and not config.has_stale_gradients else 0,
    )


def measure_traffic(args: argparse.Namespace) -> None:
    """Print the table."""
    num_backbone, num_head = int(args.parameters), int(args.head_parameters)
    table = Table(title=f"Per step, {num_backbone:,} + {num_head:,} parameters in float32")
    table.add_column("exchange")
    table.add_column("compression")
    for column in ("receiver writes", "donor writes", "round trips waited for"):
        table.add_column(column, justify="right")
    rows = []
    for name, config in SETTINGS.items():
        for compression in COMPRESSIONS if config.exchange != "distill" else COMPRESSIONS[:1]:
            settings = dataclasses.replace(config, compression=compression)
            found = traffic_of(settings, num_backbone, num_head)
            rows.append({"exchange": name, "compression": compression, **dataclasses.asdict(found)})
            sizes = (decimal(round(n)) for n in (found.receiver_bytes, found.donor_bytes))
            waits = f"{found.waits:.3g}"
            table.add_row(name, compression, *sizes, waits)
    Console().print(table)
    write_figures({"parameters": [num_backbone, num_head], "rows": rows}, args.output)
