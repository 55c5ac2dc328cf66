"""Train across jobs that share nothing but a directory."""

from toolkit.bridge.config import BridgeConfig
from toolkit.bridge.donor import GradientDonor
from toolkit.bridge.errors import BridgeError, PayloadError, PeerError, SchemaMismatchError
from toolkit.bridge.receiver import GradientReceiver

__version__ = "0.1.0"

__all__ = [
    "BridgeConfig",
    "BridgeError",
    "GradientDonor",
    "GradientReceiver",
    "PayloadError",
    "PeerError",
    "SchemaMismatchError",
]
