"""The choice of calls that run as one: calls of one kernel that differ only in their bytes and first axes' lengths."""

import math
from collections.abc import Iterable
from itertools import islice

from unlatch.compute.call import Call
from unlatch.compute.ipc.frames import MAX_MEMBERS_BYTES, described_bytes

# Larger calls gain nothing by a batch, and joining their arrays takes the same memory again.
_MAX_BATCH_BYTES = 32 * 1024 * 1024
# Bound of the search: many calls may wait, and none of them may fit into the batch any more.
_MAX_LOOKED_AT = 1024


def companions(call: Call, alike: Iterable[Call], now: float) -> list[Call]:
    """Return those of the waiting calls `alike` that run as one with `call`."""
    rows, size, seconds = call.rows, call.size, call.estimate.seconds
    most = MAX_MEMBERS_BYTES // described_bytes(len(shape) for shape in call.arguments.shapes)
    most_seconds = _seconds_for(call, now)
    found: list[Call] = []
    for other in islice(alike, _MAX_LOOKED_AT):
        if rows >= call.spec.max_batch_size or len(found) + 1 >= most:
            break
        if other.estimate.long and not call.estimate.long:
            # This worker may be one that is kept free of long calls.
            continue
        more = rows + other.rows, size + other.size, seconds + other.estimate.seconds
        if more[0] <= call.spec.max_batch_size and more[1] <= _MAX_BATCH_BYTES and more[2] <= most_seconds:
            rows, size, seconds = more
            found.append(other)
    return found


def _seconds_for(call: Call, now: float) -> float:
    """Return the longest time that a batch may take so that its first call is neither late nor over its limit."""
    return min(call.demand.deadline - now, call.spec.timeout_seconds or math.inf)
