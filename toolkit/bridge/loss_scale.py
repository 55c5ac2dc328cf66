"""The loss scale of a donor that follows: no optimizer step moves it, so the bridge's vote does."""

from __future__ import annotations

from accelerate import Accelerator


class FollowedLossScale:
    """Backs off and grows as ``torch.amp.GradScaler.update`` would.

    Args:
        accelerator: its scaler, if there is one, is moved.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._finite_windows = 0

    def update(self, was_finite: bool, scale: float) -> None:
        """After a window with this outcome, at this scale."""
        scaler = self._accelerator.scaler
        if scaler is None or not scaler.is_enabled():
            return
        self._finite_windows = self._finite_windows + 1 if was_finite else 0
        if not was_finite:
            scaler.update(scale * scaler.get_backoff_factor())
        elif self._finite_windows == scaler.get_growth_interval():
            scaler.update(scale * scaler.get_growth_factor())
            self._finite_windows = 0
