"""The work itself, as plain functions that all subjects run.

The amount of work is an input array, so one calibration (in the bench's own process) holds for all subjects.
"""

import asyncio
import os
import time

import numpy as np
from jaxtyping import Float64, Int64

# 64 KiB of doubles: in the L2 cache, and below malloc's mmap threshold, so that neither memory nor the allocator is
# measured.
SPIN_DOUBLES = 8_192
CHAIN_DOUBLES = 200_000


def spin10(rounds: Int64[np.ndarray, "n"]) -> Float64[np.ndarray, "n"]:
    """`rounds` cosines over an array that stays in the cache: one core, no BLAS; about 10 ms when calibrated."""
    x = np.linspace(0.0, 1.0, SPIN_DOUBLES)
    for _ in range(int(rounds[0])):
        np.cos(x, out=x)
    return np.array([x.sum()])


def elementwise(seed: Float64[np.ndarray, "n"]) -> Float64[np.ndarray, "m"]:
    """Do about 10 ms (default malloc) of plain arithmetic over 200,000 doubles, one named array a line.

    The names live until the function returns, so glibc then returns their memory to the system and the next call faults
    it in again (some 5,000 page faults a call). Code whose temporary arrays malloc reuses would gain nothing here.
    """
    time_ = np.arange(CHAIN_DOUBLES) * 1e-5
    position = time_ + seed[0]
    velocity = 1.0 - position
    drag = 0.1 * velocity
    lift = 0.2 * position
    force = lift - drag
    moved = position + 0.01 * velocity
    faster = velocity + 0.01 * force
    kinetic = 0.5 * faster * faster
    potential = 9.81 * moved
    energy = kinetic + potential
    excess = energy - 4.0
    bounded = np.clip(excess, -1.0, 1.0)
    weight = 1.0 - np.abs(bounded)
    blended = weight * moved + bounded * position
    error = blended - moved
    squared = error * error
    damped = squared / (1.0 + squared)
    return np.array([damped.mean(), energy.max()])


def python_loop(rounds: Int64[np.ndarray, "n"]) -> Int64[np.ndarray, "n"]:
    """`rounds` turns of a pure-Python loop that never releases the GIL; about 10 ms when calibrated."""
    total = 0
    for i in range(int(rounds[0])):
        total = (total * 31 + i) & 0xFFFFFFFF
    return np.array([total])


def wait10(milliseconds: Float64[np.ndarray, "n"]) -> Float64[np.ndarray, "n"]:
    """Wait without releasing the worker, as for a disk or another service."""
    time.sleep(float(milliseconds[0]) / 1e3)
    return milliseconds.copy()


async def wait10_async(milliseconds: Float64[np.ndarray, "n"]) -> Float64[np.ndarray, "n"]:
    """Wait on the event loop."""
    await asyncio.sleep(float(milliseconds[0]) / 1e3)
    return milliseconds.copy()


def burnt(milliseconds: float) -> Float64[np.ndarray, "3"]:
    """Use `milliseconds` of processor time.

    Returns the start on the machine's monotonic clock and the time used, both in seconds, and the process id.
    """
    began, cpu = time.monotonic(), time.thread_time()
    while (used := time.thread_time() - cpu) < milliseconds / 1e3:
        pass
    return np.array([began, used, os.getpid()])


def costly(x: Float64[np.ndarray, "rows columns"]) -> Float64[np.ndarray, "rows columns"]:
    """Double the rows, using 1 ms of processor time for any number of rows, and 10 µs for each."""
    burnt(1.0 + 0.01 * len(x))
    return x * 2.0


def light(x: Float64[np.ndarray, "rows columns"]) -> Float64[np.ndarray, "rows columns"]:
    """Some thirty plain steps over small rows: about 20 µs for one row, and hardly more for many.

    Every step rounds equally wherever a row lies, so a row's result is the same to the bit in any batch.
    """
    y = x + 1.0
    for _ in range(6):
        y = np.sqrt(y * y + x)
        y = y / (1.0 + np.abs(y))
    return y
