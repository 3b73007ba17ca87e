"""Tests run beside one another, in as many processes as pytest-xdist was told; those marked `alone` do not.

One that measures what processor time or memory the machine gives it has the machine to itself: it waits until the tests
under way have ended, and none begins before it has. Locks on two directories of this checkout say so, so that several
runs of the tests keep out of each other's way too.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_TESTS = Path(__file__).resolve().parents[1]
# Whoever is about to begin holds the door: one who waits for the room to empty lets nobody in behind himself.
_DOOR, _ROOM = _TESTS, _TESTS / "support"


@contextmanager
def a_turn(*, alone: bool) -> Iterator[None]:
    """Within, a test runs: beside others, or by itself."""
    with _open(_ROOM) as room:
        with _open(_DOOR) as door:
            fcntl.flock(door, fcntl.LOCK_EX)
            fcntl.flock(room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
            fcntl.flock(door, fcntl.LOCK_UN)
        try:
            yield
        finally:
            # Said, and not left to the closing: a process that the test has forked may hold the descriptor still.
            fcntl.flock(room, fcntl.LOCK_UN)


@contextmanager
def _open(directory: Path) -> Iterator[int]:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
