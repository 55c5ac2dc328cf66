"""What TensorBoard's pages show of a job beside its curves: a layout, tables, and events.

All of it is plain data here; :mod:`toolkit.metrics` writes it down.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import NoneType
from typing import Any

from toolkit.bridge.config import BridgeConfig
from toolkit.bridge.payload import payload_dtype
from toolkit.parameters import SharedParameters

Layout = Mapping[str, Mapping[str, tuple[str, list[str]]]]

CATEGORY = "Is it working?"
# Titles of charts, and a regular expression of the tags in them.
CHARTS = {
    "loss in training (per sample)": r"loss/",
    "accuracy in evaluation (%)": r"(accuracy|validation)/",
}
BRIDGE_CHARTS = {
    **CHARTS,
    "staleness of the donors' weights (receiver steps)": r"bridge/staleness .*\[receiver steps\]",
    "cosine of the own and a donor's gradient (backbone)": r"gradient/cosine own ",
    "waiting for the other job (% of the step)": r"bridge/wait \[% of the step\]",
    "fates of payloads (payloads so far)": r"fates/",
    "who is there (0 or 1), alarms": r"events/",
}
# Settings that say where a run is, and not what it is.
PLACES = frozenset({
    "has_bound", "key_file", "output_dir", "report_to", "resume_from_checkpoint", "run", "runs_dir",
    "with_tracking",
})  # fmt: skip
MAX_EVENTS = 50  # rows of the newest
MAX_TENSORS = 200  # rows of a schema


def layout(charts: Mapping[str, str]) -> Layout:
    """The charts of TensorBoard's page "Custom Scalars". Those of several runs merge if equal."""
    return {CATEGORY: {title: ("Multiline", [tags]) for title, tags in charts.items()}}


def plain(config: Mapping[str, Any]) -> dict[str, bool | int | float | str | None]:
    """Settings as every tracker takes them; values of other types become text."""
    return {
        name: value if isinstance(value, (bool, int, float, str, NoneType)) else str(value)
        for name, value in config.items()
    }


def hyperparameters(config: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """The settings that can make one run differ from another; ``None`` as text."""
    settings = {name: value for name, value in config.items() if name not in PLACES}
    return {name: str(v) if v is None else v for name, v in plain(settings).items()}


def settings_table(config: Mapping[str, Any]) -> str:
    """Settings as Markdown; those that are not set in one line at the end."""
    rows = [f"| `{name}` | `{v}` |" for name, v in config.items() if v is not None]
    unset = ", ".join(f"`{name}`" for name, value in config.items() if value is None)
    table = ["| setting | value |", "|---|---|", *rows]
    return "\n".join([*table, "", f"Not set: {unset}"] if unset else table)


def exchange_table(shared: SharedParameters, config: BridgeConfig) -> str:
    """Which tensors the jobs share and what crosses of each, as Markdown.

    Args:
        shared: of this job.
        config: of this job.
    """
    donated = "change in local steps" if config.exchange == "delta" else "sum of gradients"
    own = "own weights, once alone" if config.follows else "own weights"
    rows, num_bytes = [], 0
    for name, tensor in shared.weights.items():
        rests = name in shared.resting
        is_of_backbone = config.scope == "all" and name in shared.backbone and not rests
        in_payload = name in shared.head or is_of_backbone
        from_donors = []
        if in_payload and config.exchange != "distill":
            from_donors.append(f"{donated} ({_plain_dtype(payload_dtype(tensor.dtype))})")
        if config.has_own_weights:
            from_donors.append(own)
        from_receiver = "weights" if config.follows and not rests else ""
        shape = "x".join(map(str, tensor.shape)) or "scalar"
        dtype = _plain_dtype(tensor.dtype)
        rows.append(
            f"| `{name}` | {shape} | {dtype} | {from_receiver} | {'; '.join(from_donors)} |"
        )
        num_bytes += tensor.numel() * tensor.itemsize
    left_out = len(rows) - MAX_TENSORS
    lines = [
        f"Exchange `{config.exchange}`: {len(rows)} tensors, {num_bytes / 2**20:.3g} MiB.",
        "",
        "| shared tensor | shape | dtype | the receiver publishes | a donor of it publishes |",
        "|---|---|---|---|---|",
        *rows[:MAX_TENSORS],
    ]
    return "\n".join([*lines, "", f"and {left_out} more" if left_out > 0 else ""])


def _plain_dtype(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


class Events:
    """Notes when a donor came or went, a teacher took over, an alarm or a rejection came.

    Reads it off the metrics: what it notes is a change of a tag ``events/...`` or
    ``fates/rejected ...``. Rejections in a row share one.

    Attributes:
        last_step: of the newest.
        is_longer: whether the newest row has grown since :meth:`table`.
    """

    def __init__(self) -> None:
        self._known: dict[str, float] = {}
        self._rows: list[tuple[int, int, str, float, float]] = []
        self.last_step = 0
        self.is_longer = False

    def note(self, values: Mapping[str, Any], step: int) -> bool:
        """Look at the metrics of a step; whether there is a new row."""
        is_new = False
        for tag, value in values.items():
            if not tag.startswith(("events/", "fates/rejected ")):
                continue
            before, self._known[tag] = self._known.get(tag, 0.0), value
            if value == before:
                continue
            self.last_step = step
            if tag.startswith("fates/") and self._rows and self._rows[-1][2] == tag:
                first, _, _, at_first, _ = self._rows[-1]
                self._rows[-1] = (first, step, tag, at_first, value)
                self.is_longer = True
                continue
            self._rows.append((step, step, tag, before, value))
            is_new = True
        del self._rows[:-MAX_EVENTS]
        return is_new

    def table(self) -> str:
        """All of them so far, as Markdown, the newest last."""
        self.is_longer = False
        rows = [
            f"| {first if first == last else f'{first} to {last}'} | {tag.partition('/')[2]} "
            f"| {before:g} | {value:g} |"
            for first, last, tag, before, value in self._rows
        ]
        return "\n".join(["| step | what | before | now |", "|---|---|---|---|", *rows])
