"""The totals of what callers make a gateway hold. The units of a machine count them together.

The gateway's bounds (max_live_calls, max_live_bytes, max_lanes, max_held_calls, max_held_bytes) hold for all units
together, because the system divides connections among units by chance: all callers of a machine may come to one unit.
"""

import ctypes
from collections.abc import Sequence
from typing import Literal

Total = Literal["live_calls", "held_bytes", "lanes", "waiting_calls", "waiting_bytes"]


class Totals(ctypes.Structure):
    """The figures of one gateway. `held_bytes` are those of live calls; calls wait where no replica takes calls."""

    live_calls: int
    held_bytes: int
    lanes: int
    waiting_calls: int
    waiting_bytes: int
    _fields_ = (
        ("live_calls", ctypes.c_int64),
        ("held_bytes", ctypes.c_int64),
        ("lanes", ctypes.c_int64),
        ("waiting_calls", ctypes.c_int64),
        ("waiting_bytes", ctypes.c_int64),
    )

    def clear(self) -> None:
        """Hold nothing: the gateway has ended, or begins."""
        self.live_calls = self.held_bytes = self.lanes = self.waiting_calls = self.waiting_bytes = 0


class MachineTotals:
    """The figures of this gateway, and those of its siblings. A gateway that is alone has no siblings."""

    def __init__(self, own: Totals | None = None, siblings: Sequence[Totals] = ()) -> None:
        self.own = Totals() if own is None else own
        self._siblings = siblings

    def elsewhere(self, total: Total) -> int:
        """How much the siblings hold."""
        return sum(getattr(sibling, total) for sibling in self._siblings)
