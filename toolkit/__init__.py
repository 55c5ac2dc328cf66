"""Train across jobs that share nothing but a directory."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from toolkit.bridge.config import BridgeConfig
    from toolkit.bridge.donor import GradientDonor
    from toolkit.bridge.errors import (
        BridgeError,
        ClassMismatchError,
        DiskError,
        Interrupted,
        OtherKeyError,
        PayloadError,
        PeerError,
        SchemaMismatchError,
    )
    from toolkit.bridge.receiver import GradientReceiver

__version__ = "0.1.0"

__all__ = [
    "BridgeConfig",
    "BridgeError",
    "ClassMismatchError",
    "DiskError",
    "GradientDonor",
    "GradientReceiver",
    "Interrupted",
    "OtherKeyError",
    "PayloadError",
    "PeerError",
    "SchemaMismatchError",
]

_MODULES = {
    "BridgeConfig": "config",
    "GradientDonor": "donor",
    "GradientReceiver": "receiver",
}


def __getattr__(name: str) -> object:
    """Import on first use, so that the command line answers before torch is loaded."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"toolkit.bridge.{_MODULES.get(name, 'errors')}")
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
