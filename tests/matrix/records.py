"""What the matrix measured, one JSON file a case, for the summary."""

from __future__ import annotations

import json
from typing import Any

from tests.launching import ROOT

RECORDS = ROOT / "build" / "matrix"


def record(name: str, **measured: Any) -> None:
    """Keep what was measured in a case, beside what is known of it already."""
    RECORDS.mkdir(parents=True, exist_ok=True)
    path = RECORDS / f"{name}.json"
    known = json.loads(path.read_bytes()) if path.exists() else {}
    path.write_text(json.dumps(known | measured, indent=1))


def read_records() -> dict[str, dict[str, Any]]:
    """All of them, by the case's name."""
    return {path.stem: json.loads(path.read_bytes()) for path in sorted(RECORDS.glob("*.json"))}
