"""Memory shared between the dispatcher and its workers: who may write where, and why no side can harm the other.

    input arena      one for each replica. A call's bytes land here before a worker is chosen. Only the dispatcher
                     writes: once it has mapped a segment it seals it, and the kernel allows no more writable maps.
    reply segments   each belongs to one worker, which writes its replies there; the dispatcher reads.

Both are memfds: anonymous, so that no death leaves anything behind, and not counted against /dev/shm's limit. All are
sealed against shrinking, since a peer that truncates a mapped file kills the next process that touches it (SIGBUS).

The arena allocates by size classes, powers of two. Rounding up costs only address space, since pages that are never
written are never allocated. A segment holds blocks of one class, so one free list for each class is the whole
allocator.
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
    """Round `size` up to where the next tensor may start."""
    return size + ALIGNMENT - 1 & -ALIGNMENT


def offsets(lengths: Sequence[int]) -> tuple[list[int], int]:
    """Offsets of tensors of these lengths, each on an aligned boundary, and the bytes that they need together."""
    at = 0
    starts = []
    for length in lengths:
        starts.append(at)
        at = aligned(at + length)
    return starts, at


class Segment:
    """A shared memory file, as the dispatcher holds it. Raises ResourceExhausted if the system refuses to make one."""

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
            raise ResourceExhausted(f"the replica cannot allocate shared memory: {error.strerror}") from error
        self.view = memoryview(self._map)
        seals = fcntl.F_SEAL_SHRINK
        if sealed:
            # The dispatcher's own writable mapping exists already and stays; no later one can be made.
            seals |= fcntl.F_SEAL_GROW | _F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, seals)

    def follow_growth_to(self, needed: int) -> bool:
        """Map what the worker has added. Returns whether the segment has `needed` bytes. Old views stay valid."""
        if needed > self.size and (size := os.fstat(self.fd).st_size) >= needed:
            # Only up to the next power of two, as a worker grows it: a faulty worker may have made the file enormous.
            size = min(size, 1 << (needed - 1).bit_length())
            self._map = mmap.mmap(self.fd, size)
            self.view = memoryview(self._map)
            self.size = size
        return needed <= self.size

    def close(self) -> None:
        """Close the segment. Its memory is freed once no view and no worker holds it."""
        os.close(self.fd)
        del self.view, self._map


@dataclass(slots=True)
class Block:
    """Space for one call's tensors in the input arena."""

    segment: Segment
    offset: int
    size: int


class InputArena:
    """The memory into which calls' tensors arrive. `limit_bytes` bounds the tensors of all live calls together."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self.used_bytes = 0
        self._numbers = count()
        self._free: dict[int, list[Block]] = {}
        self._blocks_out: dict[int, int] = {}
        self._segments: dict[int, Segment] = {}
        self._used: set[int] = set()

    def allocate(self, size: int) -> Block:
        """Allocate a block of `size` bytes. Raises ResourceExhausted, with the limit, if live calls hold too much."""
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
        """Take a block back. Call this only when no worker can be reading it."""
        self.used_bytes -= block.size
        self._blocks_out[block.segment.number] -= 1
        self._free[max(_SMALLEST_CLASS, 1 << (block.size - 1).bit_length())].append(block)

    def drop_idle(self) -> list[int]:
        """Free segments that no call has used since the last time. Returns their numbers, for workers to forget."""
        idle = {number for number, out in self._blocks_out.items() if not out and number not in self._used}
        self._used.clear()
        for blocks in self._free.values():
            blocks[:] = [block for block in blocks if block.segment.number not in idle]
        for number in idle:
            del self._blocks_out[number]
            self._segments.pop(number).close()
        return sorted(idle)

    def close(self) -> None:
        """Close all segments."""
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
    """The reply segments of one worker. A segment is lent from the start of a run until its reply is read."""

    def __init__(self) -> None:
        self._numbers = count()
        self._free: list[Segment] = []
        self._unused: set[int] = set()
        self._closed = False

    def lend(self) -> Segment:
        """A segment whose last reply has been read. The last one used comes first, since its pages are allocated."""
        if not self._free:
            return Segment(next(self._numbers), _FIRST_REPLY_BYTES, name="unlatch-reply", sealed=False)
        segment = self._free.pop()
        self._unused.discard(segment.number)
        return segment

    def give_back(self, segment: Segment) -> None:
        """Take a segment back: its reply has been read, or will never be written."""
        if self._closed:
            segment.close()
        else:
            self._free.append(segment)

    def drop_idle(self) -> list[int]:
        """Free segments that were not used since the last time. Returns their numbers, for the worker to forget."""
        dropped = [segment for segment in self._free if segment.number in self._unused]
        self._free = [segment for segment in self._free if segment.number not in self._unused]
        self._unused = {segment.number for segment in self._free}
        for segment in dropped:
            segment.close()
        return [segment.number for segment in dropped]

    def close(self) -> None:
        """Close all segments of a worker that has ended. Segments still lent are closed when they are given back."""
        self._closed = True
        while self._free:
            self._free.pop().close()


class Mapped:
    """Segments as a worker maps them: read-only for inputs, writable for replies."""

    def __init__(self) -> None:
        self._inputs: dict[int, mmap.mmap] = {}
        self._replies: dict[int, tuple[int, mmap.mmap]] = {}

    def learn_input(self, number: int, fd: int) -> None:
        """Map an input segment, and close the descriptor."""
        self._inputs[number] = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
        os.close(fd)

    def learn_reply(self, number: int, fd: int) -> None:
        """Map a reply segment. The descriptor is kept, since the segment grows with the largest reply."""
        self._replies[number] = (fd, mmap.mmap(fd, 0))

    def forget(self, inputs: Iterable[int], replies: Iterable[int]) -> None:
        """Drop segments. Each is unmapped when the last array over it is freed."""
        for number in inputs:
            self._inputs.pop(number, None)
        for number in replies:
            fd, _ = self._replies.pop(number)
            os.close(fd)

    def input(self, number: int) -> mmap.mmap:
        return self._inputs[number]

    def reply(self, number: int, size: int) -> mmap.mmap:
        """A reply segment with at least `size` bytes."""
        fd, memory = self._replies[number]
        if size > len(memory):
            os.ftruncate(fd, 1 << (size - 1).bit_length())
            memory = mmap.mmap(fd, 0)
            self._replies[number] = (fd, memory)
        return memory
