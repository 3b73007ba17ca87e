"""Memory that front and workers share: who may write where, and why nobody can hurt anybody.

    input arena      one a replica. Bytes land here before a worker is chosen. The front alone writes: once it has
                     mapped a segment it seals it, and from then on the kernel lets nobody map it for writing.
    reply segments   each belongs to one worker, which writes its replies there; the front reads.

Both are memfds: anonymous, so nothing is left behind by any death, and outside of /dev/shm's limit. All are sealed
against shrinking, since a peer that truncates a mapped file kills whoever touches it next (SIGBUS).

The arena deals in size classes, powers of two. Rounding up costs address space only: pages that nobody writes are
never allocated. A segment holds blocks of one class, so a free list a class is the whole allocator.
"""

import fcntl
import mmap
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count

from unlatch.common.errors import ResourceExhausted

ALIGNMENT = 64
_SMALLEST_CLASS = 4096
_SEGMENT_BYTES = 4 * 1024 * 1024
_F_SEAL_FUTURE_WRITE = 0x10
_FIRST_REPLY_BYTES = 1024 * 1024


def aligned(size: int) -> int:
    """`size`, rounded up to where the next tensor may start."""
    return size + ALIGNMENT - 1 & -ALIGNMENT


def offsets(lengths: Sequence[int]) -> tuple[list[int], int]:
    """Where tensors of these lengths lie, each on an aligned boundary, and what they need together."""
    at = 0
    starts = []
    for length in lengths:
        starts.append(at)
        at = aligned(at + length)
    return starts, at


class Segment:
    """One shared memory file as the front holds it. Raises ResourceExhausted where the system gives none."""

    def __init__(self, number: int, size: int, *, name: str, sealed: bool) -> None:
        self.number = number
        self.size = size
        try:
            self.fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(self.fd, size)
            self._map = mmap.mmap(self.fd, size)
        except OSError as error:
            with suppress(AttributeError):
                os.close(self.fd)
            raise ResourceExhausted(f"the replica can share no more memory: {error.strerror}") from error
        self.view = memoryview(self._map)
        seals = fcntl.F_SEAL_SHRINK
        if sealed:
            # Our own mapping for writing exists already, and stays; no later one can be made.
            seals |= fcntl.F_SEAL_GROW | _F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, seals)

    def follow_growth_to(self, needed: int) -> bool:
        """Whether it has `needed` bytes, once what the worker has added is mapped. Views given out stay valid."""
        if needed > self.size and (size := os.fstat(self.fd).st_size) >= needed:
            # As far as the next power of two, to which a worker grows it; one that lies may have made it enormous.
            size = min(size, 1 << (needed - 1).bit_length())
            self._map = mmap.mmap(self.fd, size)
            self.view = memoryview(self._map)
            self.size = size
        return needed <= self.size

    def close(self) -> None:
        """Let go. The memory is free once no view and no worker holds it."""
        os.close(self.fd)
        del self.view, self._map


@dataclass(slots=True)
class Block:
    """Room for one call's tensors in the input arena."""

    segment: Segment
    offset: int
    size: int


class InputArena:
    """Where calls' tensors land. `limit_bytes` bounds what live calls may hold together."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self.used_bytes = 0
        self._numbers = count()
        self._free: dict[int, list[Block]] = {}
        self._blocks_out: dict[int, int] = {}
        self._segments: dict[int, Segment] = {}
        self._used: set[int] = set()

    def allocate(self, size: int) -> Block:
        """Room for `size` bytes. Raises ResourceExhausted, with the limit, when live calls hold too much."""
        size_class = max(_SMALLEST_CLASS, 1 << (size - 1).bit_length())
        if self.used_bytes + size > self._limit:
            raise ResourceExhausted(
                f"{size} bytes of tensors do not fit: calls hold {self.used_bytes} of input_arena_bytes={self._limit}"
            )
        free = self._free.get(size_class)
        if not free:
            free = self._free[size_class] = self._grow(size_class)
        block = free.pop()
        block.size = size
        self.used_bytes += size
        self._blocks_out[block.segment.number] += 1
        self._used.add(block.segment.number)
        return block

    def free(self, block: Block) -> None:
        """Take a block back. Only when no worker can be reading it."""
        self.used_bytes -= block.size
        self._blocks_out[block.segment.number] -= 1
        self._free[max(_SMALLEST_CLASS, 1 << (block.size - 1).bit_length())].append(block)

    def drop_idle(self) -> list[int]:
        """Give back segments that no call has used since the last time, and say which: workers are to forget them."""
        idle = {number for number, out in self._blocks_out.items() if not out and number not in self._used}
        self._used.clear()
        for blocks in self._free.values():
            blocks[:] = [block for block in blocks if block.segment.number not in idle]
        for number in idle:
            del self._blocks_out[number]
            self._segments.pop(number).close()
        return sorted(idle)

    def close(self) -> None:
        """Let go of everything."""
        for segment in self._segments.values():
            segment.close()
        self._segments.clear()

    def _grow(self, size_class: int) -> list[Block]:
        size = max(_SEGMENT_BYTES, size_class)
        segment = Segment(next(self._numbers), size, name="unlatch-input", sealed=True)
        self._segments[segment.number] = segment
        self._blocks_out[segment.number] = 0
        return [Block(segment, offset, 0) for offset in range(0, size, size_class)]


class ReplySegments:
    """One worker's reply segments. One is lent from when a call is given to the worker until its reply is read."""

    def __init__(self) -> None:
        self._numbers = count()
        self._free: list[Segment] = []
        self._unused: set[int] = set()
        self._closed = False

    def lend(self) -> Segment:
        """A segment whose last reply has been read. The one used last is first: its pages are there."""
        if not self._free:
            return Segment(next(self._numbers), _FIRST_REPLY_BYTES, name="unlatch-reply", sealed=False)
        segment = self._free.pop()
        self._unused.discard(segment.number)
        return segment

    def give_back(self, segment: Segment) -> None:
        """The reply in it has been read, or will never be written."""
        if self._closed:
            segment.close()
        else:
            self._free.append(segment)

    def drop_idle(self) -> list[int]:
        """Give back segments that nobody has used since the last time, and say which: the worker is to forget them."""
        dropped = [segment for segment in self._free if segment.number in self._unused]
        self._free = [segment for segment in self._free if segment.number not in self._unused]
        self._unused = {segment.number for segment in self._free}
        for segment in dropped:
            segment.close()
        return [segment.number for segment in dropped]

    def close(self) -> None:
        """The worker is gone. Segments still lent go when they are given back."""
        self._closed = True
        while self._free:
            self._free.pop().close()


class Mapped:
    """Segments as a worker sees them: read-only for inputs, writable for replies."""

    def __init__(self) -> None:
        self._inputs: dict[int, mmap.mmap] = {}
        self._replies: dict[int, tuple[int, mmap.mmap]] = {}

    def learn_input(self, number: int, fd: int) -> None:
        """Map an input segment. The descriptor is not needed afterwards."""
        self._inputs[number] = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
        os.close(fd)

    def learn_reply(self, number: int, fd: int) -> None:
        """Map a reply segment. The descriptor is kept: the segment grows with the largest reply."""
        self._replies[number] = (fd, mmap.mmap(fd, 0))

    def forget(self, inputs: Iterable[int], replies: Iterable[int]) -> None:
        """Drop segments. Each is unmapped when the last array over it is gone."""
        for number in inputs:
            self._inputs.pop(number, None)
        for number in replies:
            fd, _ = self._replies.pop(number)
            os.close(fd)

    def input(self, number: int) -> mmap.mmap:
        return self._inputs[number]

    def reply(self, number: int, size: int) -> mmap.mmap:
        """A reply segment with room for `size` bytes."""
        fd, memory = self._replies[number]
        if size > len(memory):
            os.ftruncate(fd, 1 << (size - 1).bit_length())
            memory = mmap.mmap(fd, 0)
            self._replies[number] = (fd, memory)
        return memory
