"""The table in which the units of a machine count what is used of its bounds and of tenants' quotas (decision 28).

    header | unit 0: totals, keys, cells | unit 1: totals, keys, cells | ...

The supervisor makes the table in shared memory. Each unit has a part, with its totals (gateway/totals.py), and with a
cell for each tenant that has quotas. A tenant's cells have the same number, its row, in every part. A unit writes its
own part only, and reads all of them. No lock is taken, so a unit that is killed or stopped at any moment keeps no other
one waiting. When a unit has died, the supervisor takes out of its part what the dead unit had in use.

This relies on two properties of the memory. An aligned word of 8 bytes that one process writes is seen by the others
as it was or as it is, never half written. And words that a process writes one after the other are seen in this order,
which holds on x86-64. Other processors may show them in another order: then what was taken once may be counted twice,
for as long as the bucket is not full.
"""

import ctypes
import fcntl
import mmap
import os
import secrets
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import Literal

import structlog

from unlatch.gateway.totals import MachineTotals, Totals

log = structlog.get_logger()

# Changes with the table's form, because a supervisor of the old version may start units of the new one.
_LAYOUT = 2
_HEADER_BYTES = 64
_SALT_BYTES = 16
# Three times the tenants that a gateway remembers, so that a tenant finds a free row in its window.
_ROWS = 1 << 16
# The number of rows in which a tenant's cells may be. Its key says which row is the first of them.
_WINDOW = 32
# Set in a key while the unit has the tenant open. Without it the cell is free, and holds what was used until then.
_OPEN = 1
# Logged where they hold in each unit by itself.
_ALONE = "quotas counted in this unit alone"

Gauge = Literal["in_flight", "lanes", "held_bytes"]
Quota = Literal["calls", "run_seconds"]


class _Header(ctypes.Structure):
    layout: int
    units: int
    salt: Iterable[int]
    _fields_ = (
        ("layout", ctypes.c_uint64),
        ("units", ctypes.c_uint64),
        ("salt", ctypes.c_ubyte * _SALT_BYTES),
    )


class TakenTokens(ctypes.Structure):
    """The tokens that a unit has taken from a tenant's bucket: their sum, and when it expects the bucket to be full."""

    amount: float
    full_at: float
    _fields_ = (("amount", ctypes.c_double), ("full_at", ctypes.c_double))


class Cell(ctypes.Structure):
    """The figures that a unit counts for a tenant. `limits` says by which limits it counts the buckets.

    The sums of taken tokens never become less, whichever tenant has the cell.
    """

    limits: int
    in_flight: int
    lanes: int
    held_bytes: int
    calls: TakenTokens
    run_seconds: TakenTokens
    _fields_ = (
        ("limits", ctypes.c_uint64),
        ("in_flight", ctypes.c_int64),
        ("lanes", ctypes.c_int64),
        ("held_bytes", ctypes.c_int64),
        ("calls", TakenTokens),
        ("run_seconds", TakenTokens),
    )

    def clear(self) -> None:
        """Take out what is in use."""
        self.in_flight = self.lanes = self.held_bytes = 0


class _Part(ctypes.Structure):
    totals: Totals
    keys: "ctypes.Array[ctypes.c_uint64]"
    cells: "ctypes.Array[Cell]"
    _fields_ = (("totals", Totals), ("keys", ctypes.c_uint64 * _ROWS), ("cells", Cell * _ROWS))

    def leave(self) -> None:
        """Take out what is in use, and free the cells. What was taken from the buckets stays."""
        self.totals.clear()
        for row, key in enumerate(self.keys[:]):
            if key & _OPEN:
                self.cells[row].clear()
                self.keys[row] = key & ~_OPEN


class UsageTable:
    """The table as the supervisor has it: `fd` is its file, which the units inherit. Raises OSError."""

    def __init__(self, units: int) -> None:
        self.fd = os.memfd_create("unlatch-quotas", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        # Pages that are never written take no memory.
        os.ftruncate(self.fd, _HEADER_BYTES + units * ctypes.sizeof(_Part))
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        memory = mmap.mmap(self.fd, 0)
        salt = (ctypes.c_ubyte * _SALT_BYTES)(*secrets.token_bytes(_SALT_BYTES))
        header = _Header.from_buffer(memory)
        header.layout, header.units, header.salt = _LAYOUT, units, salt
        self._parts = _parts(memory, units)

    def leave(self, unit: int) -> None:
        """Take out what a unit that has ended had in use. To be called before the unit is started again."""
        self._parts[unit].leave()

    def close(self) -> None:
        """Close the file. The memory is freed once no process has it mapped."""
        os.close(self.fd)
        del self._parts


class SharedUsage:
    """The table as a unit has it. `fd` is the inherited file, which this closes; `unit` is the number of its part.

    No two processes that run may have the same number. A unit goes on from what was taken under its number before,
    and the supervisor has taken out what was in use (`UsageTable.leave`).
    """

    def __init__(self, fd: int, unit: int, units: int) -> None:
        with open(fd, "rb") as file:
            memory = mmap.mmap(file.fileno(), 0)
        header = _Header.from_buffer(memory)
        self._salt = bytes(header.salt)
        self._unit = unit
        self._parts: Sequence[_Part] = ()
        if (header.layout, header.units) == (_LAYOUT, units):
            self._parts = _parts(memory, units)
        else:
            log.warning(_ALONE, reason="table_of_another_version")
        self._has_warned = not self._parts
        self.totals = self._machine_totals()

    def open(self, tenant: str) -> "TenantUsage | None":
        """Return where a tenant's usage is counted, until it is closed. To be opened once at a time in each unit.

        None if there is no room: the tenant's quotas then hold in each unit by itself.
        """
        digest = blake2b(tenant.encode(errors="surrogatepass"), digest_size=16, key=self._salt).digest()
        key = int.from_bytes(digest[:8], "little") | _OPEN
        first = int.from_bytes(digest[8:], "little") % (_ROWS - _WINDOW)
        row = self._find(key, first) if self._parts else None
        if row is not None:
            self._claim(row, key)
            # Another unit may have chosen another row meanwhile. Both see that now, and take the first of the two.
            again = self._find(key, first)
            if again is not None and again != row:
                self._parts[self._unit].keys[row] = 0
                self._claim(again, key)
                row = again
            return TenantUsage(self._parts, self._unit, row, key)
        if not self._has_warned:
            self._has_warned = True
            log.warning(_ALONE, reason="table_is_full", tenant=tenant)
        return None

    def _machine_totals(self) -> MachineTotals:
        totals = [part.totals for part in self._parts]
        return MachineTotals(totals.pop(self._unit), totals) if totals else MachineTotals()

    def _find(self, key: int, first: int) -> int | None:
        """Return the row where units have the tenant open, or the best one for it. None where it has no room."""
        windows = [part.keys[first : first + _WINDOW] for part in self._parts]
        if places := [window.index(key) for window in windows if key in window]:
            row = first + min(places)
            own = self._parts[self._unit].keys[row]
            # Another tenant has the own cell there if units have opened two at the same moment.
            return row if own == key or not own & _OPEN else None
        place = _free_place(windows, key ^ _OPEN)
        return None if place is None else first + place

    def _claim(self, row: int, key: int) -> None:
        """Take the own cell of a row for a tenant, with what was taken before if it was this tenant's."""
        part = self._parts[self._unit]
        cell = part.cells[row]
        if part.keys[row] | _OPEN != key:
            part.keys[row] = 0
            cell.limits = 0
            cell.calls.full_at = cell.run_seconds.full_at = 0.0
        cell.clear()
        part.keys[row] = key


class TenantUsage:
    """A row of the table, where the units count for one tenant: this unit's cell, and those of its siblings."""

    __slots__ = ("_elsewhere", "_key", "_keys", "_row", "own")

    def __init__(self, parts: Sequence[_Part], unit: int, row: int, key: int) -> None:
        self.own: Cell = parts[unit].cells[row]
        self._key = key
        self._row = row
        self._keys = parts[unit].keys
        self._elsewhere = [(part.keys, part.cells[row]) for number, part in enumerate(parts) if number != unit]

    def limit(self, limits: int) -> None:
        """Count by these limits from now on: by others than before, nothing is taken yet."""
        if self.own.limits != limits:
            # In this order: under the new limits, no sibling sees when the bucket of the old ones is full.
            self.own.calls.full_at = self.own.run_seconds.full_at = 0.0
            self.own.limits = limits

    def elsewhere(self, gauge: Gauge) -> int:
        """Return how much the tenant has in use in the other units."""
        key, row = self._key, self._row
        return sum(getattr(cell, gauge) for keys, cell in self._elsewhere if getattr(cell, gauge) and keys[row] == key)

    def taken_elsewhere(self, quota: Quota) -> Sequence[TakenTokens]:
        """Return what each of the other units has taken from a bucket. Their cells may become other tenants'."""
        return [getattr(cell, quota) for _, cell in self._elsewhere]

    def counts_elsewhere(self) -> Sequence[int]:
        """Return for each of the other units by which limits it counts for this tenant; 0 if it does not."""
        row, keys = self._row, (self._key, self._key ^ _OPEN)
        return [cell.limits if others[row] in keys else 0 for others, cell in self._elsewhere]

    def close(self) -> None:
        """Free the unit's cell."""
        self.own.clear()
        self._keys[self._row] = self._key & ~_OPEN


def _parts(memory: mmap.mmap, units: int) -> Sequence[_Part]:
    return list((_Part * units).from_buffer(memory, _HEADER_BYTES))


def _free_place(windows: Sequence[Sequence[int]], before: int) -> int | None:
    """Return a place where no unit has a tenant open. First choice is where the tenant was before."""
    places = [window.index(before) for window in windows if before in window]
    # Next where no tenant was yet.
    places += [place for place, keys in enumerate(zip(*windows, strict=True)) if not any(keys)]
    free = (place for place in (*places, *range(_WINDOW)) if not any(window[place] & _OPEN for window in windows))
    return next(free, None)
