"""Kernels that take memory: too much, around the limit, without end, or more than they have declared."""

import ctypes
import os
import time
from pathlib import Path

import numpy as np
from jaxtyping import Float64, Int64

from unlatch import KernelError, kernel

Vector = Float64[np.ndarray, "rows"]
Pid = Int64[np.ndarray, ""]

DECLARED_BYTES = 32 * 1024 * 1024

_kept: list[object] = []


@kernel
def own_pid() -> Pid:
    """Return the worker's pid."""
    return np.array(os.getpid())


@kernel
def allocates(*, megabytes: int) -> Pid:
    """Write to an array of that size, and free it."""
    np.ones(megabytes << 17)
    return np.array(os.getpid())


@kernel(memory=DECLARED_BYTES)
def declares(*, megabytes: int) -> Pid:
    """Do the same in a kernel that declares how much it needs."""
    np.ones(megabytes << 17)
    return np.array(os.getpid())


@kernel
def waits(*, gate: str) -> Pid:
    """Hold the worker until the gate opens."""
    Path(gate).read_bytes()
    return np.array(os.getpid())


@kernel(batch=True)
def allocates_together(x: Vector) -> Vector:
    """Allocate as many megabytes as all rows together say."""
    np.ones(int(x.sum()) << 17)
    return x


@kernel
def fills() -> Pid:
    """Allocate small objects until there is no room for another."""
    held: list[object] = []
    # Only a collection of cycles frees this.
    held.append(held)
    while True:
        held.append(bytes(400))


@kernel
def refuses(*, megabytes: int) -> Pid:
    """Raise an error while memory is in use."""
    held = np.ones(megabytes << 17)
    raise KernelError(f"all {len(held)} of them")


@kernel
def keeps(*, megabytes: float) -> Pid:
    """Keep memory for ever."""
    _kept.append(np.ones(int(megabytes * (1 << 17))))
    return np.array(os.getpid())


@kernel(pure=True)
def escapes(*, megabytes: int, seconds: float, record: str = "", gate: str = "") -> Pid:
    """Take memory that RLIMIT_DATA does not count: it is written and then made read-only, 16 MiB at a time.

    At the gate, if there is one, the kernel has as much as it may have.
    """
    if record:
        with Path(record).open("a") as opened:
            opened.write(f"{os.getpid()}\n")
    if gate:
        held = np.ones(64 << 17)
        Path(gate).read_bytes()
        del held
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    read, write, private, anonymous = 1, 2, 2, 32
    size = ctypes.c_size_t(16 << 20)
    for _ in range(megabytes // 16):
        block = ctypes.c_void_p(libc.mmap(None, size, read | write, private | anonymous, -1, ctypes.c_long(0)))
        ctypes.memset(block, 1, size.value)
        assert libc.mprotect(block, size, read) == 0
    time.sleep(seconds)
    return np.array(os.getpid())
