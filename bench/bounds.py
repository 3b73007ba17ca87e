"""Figures, and the bounds that they must keep."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Figures = dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """A bound of a figure, in the unit at the end of the figure's name."""

    name: str
    at_most: float | None = None
    at_least: float | None = None

    def met(self, value: float) -> bool:
        return (self.at_most is None or value <= self.at_most) and (self.at_least is None or value >= self.at_least)


def judged(found: Mapping[str, float], bounds: Sequence[Bound]) -> dict[str, dict[str, Any]]:
    """Figures with a bound, measured or not, and whether they keep it."""
    return {
        bound.name: {
            "value": (value := found.get(bound.name)),
            "at_most": bound.at_most,
            "at_least": bound.at_least,
            "met": None if value is None else bound.met(value),
        }
        for bound in bounds
    }
