"""Turns of tests: they run beside each other in as many processes as pytest-xdist was told, but not if marked `alone`.

A test that measures the processor time or memory that the machine gives it has the machine to itself. It waits until
the running tests have ended, and no other test begins before it has ended. Locks on two directories of this checkout
do this, so that several runs of the tests keep out of each other's way too.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_TESTS = Path(__file__).resolve().parents[1]
# Each test locks the door before the room. A test that waits for the room to empty keeps the door locked meanwhile.
_DOOR, _ROOM = _TESTS, _TESTS / "support"


@contextmanager
def a_turn(*, alone: bool) -> Iterator[None]:
    """Run a test inside the `with` block, beside others or by itself."""
    with _open(_ROOM) as room:
        with _open(_DOOR) as door:
            fcntl.flock(door, fcntl.LOCK_EX)
            fcntl.flock(room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
            fcntl.flock(door, fcntl.LOCK_UN)
        try:
            yield
        finally:
            # Unlock it here, and not by closing it: a process that the test has forked may still hold it.
            fcntl.flock(room, fcntl.LOCK_UN)


@contextmanager
def _open(directory: Path) -> Iterator[int]:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
