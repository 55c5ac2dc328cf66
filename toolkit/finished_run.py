"""A run that is over, with all that a replay of it needs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from toolkit.bridge.authentication import Signer
from toolkit.bridge.errors import BridgeError
from toolkit.bridge.replay import KeptPayloads

# What a replay needs of results.json, as paths of keys with the type of the value.
_NEEDED: dict[tuple[str, ...], type] = {
    ("num_processes",): int,
    ("completed_steps",): int,
    ("steps_alone",): int,
    ("provenance", "attempt"): int,
    ("provenance", "run_id"): str,
    ("provenance", "final_weights_digest"): str,
    ("provenance", "arguments"): dict,
    ("provenance", "arguments", "keep_payloads"): bool,
    ("provenance", "environment", "device"): str,
    ("provenance", "environment", "mixed_precision"): str,
    ("provenance", "environment", "num_threads"): int,
    ("provenance", "environment", "working_directory"): str,
}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FinishedRun:
    """A run whose receiver has ended and has kept its payloads."""

    directory: Path
    results: dict[str, Any]
    weights: dict[str, Tensor]
    payloads: KeptPayloads

    @property
    def provenance(self) -> dict[str, Any]:
        """What the recipe recorded in order to be repeated."""
        recorded: dict[str, Any] = self.results["provenance"]
        return recorded


def find_run(name: str, runs_dir: Path) -> Path:
    """The directory of a run, given as a path or by its name in ``runs_dir``.

    Raises:
        BridgeError: if there is none.
    """
    candidates = [Path(name), runs_dir / name]
    for path in candidates:
        if (path / "bridge" / "run.json").is_file():
            return path
    raise BridgeError(
        f"there is no run {name!r}: looked for {' and '.join(map(str, candidates))}. Give the "
        "directory of a run, such as runs/0001, or its name and --runs_dir"
    )


def open_run(directory: Path, output_dir: Path | None, signer: Signer) -> FinishedRun:
    """Read what a run recorded, but for its payloads.

    Args:
        directory: of the run.
        output_dir: of the receiver; None if it had none of its own.
        signer: with the run's key, if it has one.

    Raises:
        BridgeError: if the run has another key, has not ended, kept no payloads, or cannot be read.
    """
    output_dir = output_dir or directory / "receiver"
    try:
        results = _read_results(output_dir / "results.json")
        weights = load_file(output_dir / "model.safetensors")
    except FileNotFoundError as error:
        absent = error.filename or output_dir / "model.safetensors"  # safetensors names none
        raise BridgeError(
            f"run {directory} has not ended, or is none of recipes/receiver.py: there is no "
            f"{absent}. Resume the receiver; if it had an --output_dir, give the same to verify. "
            "A script of your own replays with BridgeConfig(replay=...)"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise BridgeError(
            f"{output_dir} does not hold the results of recipes/receiver.py: {error!r}"
        ) from None
    provenance = results["provenance"]
    if not provenance["arguments"]["keep_payloads"]:
        raise BridgeError(
            f"run {directory} kept no payloads, so there is nothing to replay it from: train with "
            "--keep_payloads on the receiver"
        )
    payloads = KeptPayloads(directory, signer)
    if payloads.run_id != provenance["run_id"]:
        raise BridgeError(
            f"{output_dir} holds the results of another run than {directory}: give the one that "
            "its receiver wrote to (--output_dir). If a later run wrote to the same directory, the "
            "results of this one are gone"
        )
    if payloads.attempt != provenance["attempt"]:
        raise BridgeError(
            f"run {directory} was gone on with (start {payloads.attempt} of its receiver) after "
            f"the results of start {provenance['attempt']}, and has not ended: resume it"
        )
    return FinishedRun(directory=directory, results=results, weights=weights, payloads=payloads)


def _read_results(path: Path) -> dict[str, Any]:
    """``results.json``, with all that a replay needs of it.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is no JSON.
        KeyError: if something is missing.
        TypeError: if something is of another type.
    """
    results: dict[str, Any] = json.loads(path.read_bytes())
    for keys, kind in _NEEDED.items():
        value: Any = results
        for key in keys:
            value = value[key]
        if type(value) is not kind:
            raise TypeError(f"{'.'.join(keys)} is {value!r}")
    return results
