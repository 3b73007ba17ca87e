"""Numbers of flags on the command line, within bounds."""

from argparse import ArgumentTypeError
from collections.abc import Callable
from typing import TypeVar

from unlatch.common.errors import shown

N = TypeVar("N", int, float)


def seconds(text: str) -> float:
    """Parse a flag's seconds. Raises ArgumentTypeError, which argparse reports."""
    return bounded_number(text, float, 0.001, 1e9, "a number of seconds")


def bounded_number(text: str, kind: Callable[[str], N], least: N, most: N, what: str) -> N:
    """Parse a flag's number within bounds. Raises ArgumentTypeError, which argparse reports."""
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not least <= value <= most:
        raise ArgumentTypeError(f"wanted {what} from {least:g} to {most:g}, got {shown(text)}")
    return value
