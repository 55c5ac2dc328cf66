"""What a donor of exchange ``distill`` agrees to, where a test plays it."""

from __future__ import annotations

from typing import Any


def distill_terms(head: str) -> dict[str, Any]:
    """For :func:`toolkit.bridge.runs.attach`: a teacher may have any shape."""
    return {
        "schemas": {"backbone": {}, head: {}},
        "exchange": "distill",
        "local_steps": None,
        "scope": "all",
        "unit": "samples",
    }
