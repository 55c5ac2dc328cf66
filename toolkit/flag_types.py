"""Types of command-line values, and a help text that shows defaults worth showing."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable


class DefaultsFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to a flag's help, unless it says nothing (None, or a switch that is off)."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        if isinstance(action.default, list | tuple):
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        return super()._get_help_string(action)


def positive_int(text: str) -> int:
    """A whole number of at least 1."""
    return _number(text, int, lambda value: value >= 1, "a whole number of at least 1")


def non_negative_int(text: str) -> int:
    """A whole number of at least 0."""
    return _number(text, int, lambda value: value >= 0, "a whole number of at least 0")


def positive_float(text: str) -> float:
    """A finite number above 0."""
    return _number(text, float, lambda value: 0 < value < math.inf, "a number above 0")


def non_negative_float(text: str) -> float:
    """A finite number of at least 0."""
    return _number(text, float, lambda value: 0 <= value < math.inf, "a number of at least 0")


def checkpointing_steps(text: str) -> int | str:
    """A whole number of steps, or the word ``epoch``."""
    if text == "epoch":
        return text
    return _number(text, int, lambda value: value >= 1, "a number of steps, or 'epoch'")


def weights(text: str) -> float | dict[str, float]:
    """A number of at least 0, or several by name: ``first=0.7,second=0.3``."""
    if "=" not in text:
        return non_negative_float(text)
    pairs = [pair.partition("=") for pair in text.split(",")]
    return {name.strip(): non_negative_float(value) for name, _, value in pairs}


def shard(text: str) -> tuple[int, int]:
    """One part of several: ``0/2`` is the first of two; its index and their number."""
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(
            "expected INDEX/COUNT with INDEX from 0 to COUNT - 1, such as 0/2 and 1/2 for two "
            f"parts, got {text!r}"
        )
    return int(index), int(count)


def _number(
    text: str, convert: Callable[[str], float], accept: Callable[[float], bool], wanted: str
) -> int:
    # argparse shows the message of this error class only.
    error = argparse.ArgumentTypeError(f"expected {wanted}, got {text!r}")
    try:
        value = convert(text)
    except ValueError:
        raise error from None
    if not accept(value):
        raise error
    return value  # type: ignore[return-value]
