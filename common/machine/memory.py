"""Memory: the container's limit, and control over what glibc's malloc keeps of freed memory."""

import ctypes
from pathlib import Path

from unlatch.common.machine import cgroups

# Version 1 cannot express "no limit": it reports the largest number of whole pages that fits in 63 bits.
_NO_LIMIT_BYTES = 1 << 62

# <malloc.h>
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -2, -3, -8


def granted_memory(root: Path = cgroups.ROOT, own: Path = cgroups.OWN) -> int:
    """The lowest memory limit, in bytes, of this process's cgroup and all above it; 0 if there is none.

    The machine's own memory does not count as a limit: it is not reserved for this process, and running out of it does
    not end a whole container.
    """
    limits = [
        *(cgroups.said(level / "memory.max") for level in cgroups.levels(root, own, "")),
        *(cgroups.said(level / "memory.limit_in_bytes") for level in cgroups.levels(root, own, "memory", "memory")),
    ]
    return min((int(limit) for limit in limits if limit.isdecimal() and int(limit) < _NO_LIMIT_BYTES), default=0)


# The functions below do nothing if libc lacks what they call (musl).


def keep_freed(*, largest_bytes: int, most_bytes: int, step_bytes: int) -> None:
    """Let malloc keep freed blocks up to `largest_bytes`, `most_bytes` in all, and grow by `step_bytes`."""
    if _MALLOPT is not None:
        _MALLOPT(_M_MMAP_THRESHOLD, largest_bytes)
        _MALLOPT(_M_TRIM_THRESHOLD, most_bytes)
        grow_by(step_bytes)


def grow_by(step_bytes: int) -> None:
    """Let malloc ask the system for `step_bytes` more than it needs. The system refuses need and step together."""
    if _MALLOPT is not None:
        _MALLOPT(_M_TOP_PAD, step_bytes)


def share_heaps(most: int) -> None:
    """Let threads share `most` heaps, the first thread's included. By default each has one, up to eight a core."""
    if _MALLOPT is not None:
        _MALLOPT(_M_ARENA_MAX, most)


def give_freed_back() -> None:
    """Return all pages that hold only freed blocks to the system. The next use faults them in again."""
    if _MALLOC_TRIM is not None:
        _MALLOC_TRIM(ctypes.c_size_t(0))


def freed_bytes() -> int:
    """Freed bytes that malloc keeps, and hands out before it asks the system."""
    return int(_MALLINFO().fordblks) if _MALLINFO is not None else 0


def take(size: int) -> int | None:
    """Allocate a block without touching it, so that it costs no page. None if there is none."""
    block: int | None = _MALLOC(size)
    return block


def put_back(block: int | None) -> None:
    """Free a block from `take`."""
    _FREE(block)


class _Mallinfo(ctypes.Structure):
    """`struct mallinfo2`."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


_LIBC = ctypes.CDLL(None)
_MALLOC, _FREE = _LIBC.malloc, _LIBC.free
_MALLOC.restype, _MALLOC.argtypes, _FREE.argtypes = ctypes.c_void_p, (ctypes.c_size_t,), (ctypes.c_void_p,)
_MALLOPT = getattr(_LIBC, "mallopt", None)
_MALLOC_TRIM = getattr(_LIBC, "malloc_trim", None)
_MALLINFO = getattr(_LIBC, "mallinfo2", None)
if _MALLINFO is not None:
    _MALLINFO.restype = _Mallinfo
