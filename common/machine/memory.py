"""Memory: control over what glibc's malloc keeps of freed memory."""

import ctypes

# <malloc.h>
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -2, -3, -8


# The functions below do nothing if libc lacks what they call (musl).


def keep_freed(*, largest_bytes: int, most_bytes: int, step_bytes: int) -> None:
    """Let malloc keep freed blocks up to `largest_bytes`, `most_bytes` in all, and grow by `step_bytes`."""
    _MALLOPT(_M_MMAP_THRESHOLD, largest_bytes)
    _MALLOPT(_M_TRIM_THRESHOLD, most_bytes)
    grow_by(step_bytes)


def grow_by(step_bytes: int) -> None:
    """Let malloc ask the system for `step_bytes` more than it needs. The system refuses need and step together."""
    _MALLOPT(_M_TOP_PAD, step_bytes)


def share_heaps(most: int) -> None:
    """Let threads share `most` heaps, the first thread's included. By default each has one, up to eight a core."""
    _MALLOPT(_M_ARENA_MAX, most)


def give_freed_back() -> None:
    """Return all pages that hold only freed blocks to the system. The next use faults them in again."""
    _MALLOC_TRIM(ctypes.c_size_t(0))


def freed_bytes() -> int:
    """Freed bytes that malloc keeps, and hands out before it asks the system."""
    return int(_MALLINFO().fordblks) if _MALLINFO is not None else 0


def used_bytes() -> int:
    """Bytes of all blocks that malloc has handed out, and that are not freed yet."""
    if _MALLINFO is None:
        return 0
    told = _MALLINFO()
    return int(told.uordblks) + int(told.hblkhd)


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


def _nothing(*_: object) -> None:
    """Stand for a function that libc lacks."""


_LIBC = ctypes.CDLL(None)
_MALLOC, _FREE = _LIBC.malloc, _LIBC.free
_MALLOC.restype, _MALLOC.argtypes, _FREE.argtypes = ctypes.c_void_p, (ctypes.c_size_t,), (ctypes.c_void_p,)
_MALLOPT = getattr(_LIBC, "mallopt", _nothing)
_MALLOC_TRIM = getattr(_LIBC, "malloc_trim", _nothing)
_MALLINFO = getattr(_LIBC, "mallinfo2", None)
if _MALLINFO is not None:
    _MALLINFO.restype = _Mallinfo
