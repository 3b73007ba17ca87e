"""Kernels that take memory: too much, around the limit, for ever, or more than they said."""

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
    """Which worker this is."""
    return np.array(os.getpid())


@kernel
def allocates(*, megabytes: int) -> Pid:
    """An array of that size, written to and freed again."""
    np.ones(megabytes << 17)
    return np.array(os.getpid())


@kernel(memory=DECLARED_BYTES)
def declares(*, megabytes: int) -> Pid:
    """The same of a kernel that has said how much it needs."""
    np.ones(megabytes << 17)
    return np.array(os.getpid())


@kernel
def waits(*, gate: str) -> Pid:
    """Hold the worker until the gate opens."""
    Path(gate).read_bytes()
    return np.array(os.getpid())


@kernel(batch=True)
def allocates_together(x: Vector) -> Vector:
    """An array of as many megabytes as all rows say."""
    np.ones(int(x.sum()) << 17)
    return x


@kernel
def fills() -> Pid:
    """Small objects until there is no room for one more."""
    held: list[object] = []
    # Nothing but a collection gives this back.
    held.append(held)
    while True:
        held.append(bytes(400))


@kernel
def refuses(*, megabytes: int) -> Pid:
    """An error while memory is in use."""
    held = np.ones(megabytes << 17)
    raise KernelError(f"all {len(held)} of them")


@kernel
def keeps(*, megabytes: float) -> Pid:
    """Memory that is never given back."""
    _kept.append(np.ones(int(megabytes * (1 << 17))))
    return np.array(os.getpid())


@kernel(pure=True)
def escapes(*, megabytes: int, seconds: float, record: str = "", gate: str = "") -> Pid:
    """Memory that RLIMIT_DATA does not count: written and then made read-only, 16 MiB at a time.

    At the gate, where one is named, it has as much as anybody may.
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
