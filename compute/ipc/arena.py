"""Memory shared between the dispatcher and its workers: who may write where.

    input arena      one for each replica. A call's bytes land here before a worker is chosen. Only the dispatcher
                     writes: once it has mapped a segment it seals it, and Linux allows no more writable maps.
    reply segments   each belongs to one worker, which writes its replies there; the dispatcher reads.

This protects the dispatcher, and calls from being changed. It keeps no secret between the kernels of a replica: every
worker can read the whole input arena, so a kernel can read the inputs of all calls that are in the replica. Inputs of
ended calls are overwritten: small ones at once, large ones within seconds.

Both are memfds: anonymous, so that no death leaves anything behind, and not counted against /dev/shm's limit. All are
sealed against shrinking, since a peer that truncates a mapped file kills the next process that touches it (SIGBUS).

The arena allocates by size classes, powers of two. Rounding up costs only address space, since pages that are never
written are never allocated. A segment holds blocks of one class, so one free list for each class is the whole
allocator.
"""

import fcntl
import mmap
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import count

from unlatch.common.errors import ResourceExhausted
from unlatch.compute.ipc.frames import Forget, Learn

ALIGNMENT = 64
_SMALLEST_CLASS = 4096
_SEGMENT_BYTES = 4 * 1024 * 1024
_F_SEAL_FUTURE_WRITE = 0x10
_FIRST_REPLY_BYTES = 1024 * 1024
# The segment number of a call without bytes.
_NO_SEGMENT = -1
# Blocks up to this size are overwritten when they are freed, which takes 2 µs at most.
_WIPED_AT_ONCE_BYTES = 64 * 1024
_ZEROS = memoryview(bytes(1024 * 1024))
# The system takes 0.2 ms to free a MiB. A mapping of more than this is freed piece by piece, by a thread.
_PIECE_BYTES = 4 * 1024 * 1024
_freeing = ThreadPoolExecutor(1, thread_name_prefix="freeing")


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
        # For its owner: how many blocks of it are allocated, and whether it was used since the last sweep.
        self.blocks_out = 0
        self.was_used = True
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
            _free(self._map)
            self._map = mmap.mmap(self.fd, size)
            self.view = memoryview(self._map)
            self.size = size
        return needed <= self.size

    def close(self) -> None:
        """Close the segment. Its memory is freed once no view and no worker holds it."""
        _free(self._map, self.fd)
        del self.view, self._map


def _free(memory: mmap.mmap, fd: int | None = None) -> None:
    """Free the pages of a mapping that is not used any more, and close its file. Views that are left stay valid."""
    if len(memory) > _PIECE_BYTES:
        # In a list, so that the thread has the last reference, and no caller waits while the system unmaps it.
        _freeing.submit(_free_slowly, [memory], fd)
    elif fd is not None:
        os.close(fd)


def _free_slowly(memory: list[mmap.mmap], fd: int | None) -> None:
    """Free a mapping in pieces. Between them the interpreter lock is for other threads."""
    size = len(memory[0])
    for at in range(0, size, _PIECE_BYTES):
        memory[0].madvise(mmap.MADV_DONTNEED, at, min(_PIECE_BYTES, size - at))
        time.sleep(0)
    memory.clear()
    if fd is not None:
        os.close(fd)


@dataclass(slots=True, eq=False)
class Block:
    """Space for one call's tensors in the input arena. The size is 0 while no call has it."""

    segment: Segment
    offset: int
    size_class: int
    size: int = 0


class InputArena:
    """The memory into which calls' tensors arrive. `limit_bytes` bounds the tensors of all live calls together."""

    def __init__(self, limit_bytes: int) -> None:
        # The thread starts now, so that a service has no more threads after large calls than before.
        _freeing.submit(int)
        self._limit = limit_bytes
        self.used_bytes = 0
        self._numbers = count()
        # By size class.
        self._free: dict[int, list[Block]] = {}
        self._segments: list[Segment] = []
        # Segments that workers are to forget: the last to have a file open spends the time that freeing it takes.
        self._dropped: list[Segment] = []
        # Large blocks with bytes of ended calls, and the offset at which these bytes end.
        self._written: dict[Block, int] = {}

    def allocate(self, size: int) -> Block:
        """Allocate a block of `size` bytes. Raises ResourceExhausted, with the limit, if live calls hold too much."""
        if self.used_bytes + size > self._limit:
            raise ResourceExhausted(
                f"{size} bytes of tensors do not fit: calls hold {self.used_bytes} of input_arena_bytes={self._limit}"
            )
        size_class = max(_SMALLEST_CLASS, 1 << (size - 1).bit_length())
        free = self._free.get(size_class) or self._grow(size_class)
        block = free.pop()
        block.size = size
        self.used_bytes += size
        block.segment.blocks_out += 1
        block.segment.was_used = True
        return block

    def free(self, block: Block) -> None:
        """Take a block back and overwrite it: a small one now, a large one in `wipe`. No worker may be reading it."""
        size = block.size
        self.used_bytes -= size
        block.size = 0
        block.segment.blocks_out -= 1
        self._free[block.size_class].append(block)
        if block.size_class > _WIPED_AT_ONCE_BYTES:
            self._written[block] = max(size, self._written.get(block, 0))
        else:
            block.segment.view[block.offset : block.offset + size] = _ZEROS[:size]

    def wipe(self, most_bytes: int) -> bool:
        """Overwrite at most `most_bytes` of what ended calls left in large blocks. Returns whether more is left."""
        for block, written in [*self._written.items()]:
            left = written
            # A block that another call uses now is overwritten when that call has ended.
            while left and most_bytes and not block.size:
                piece = _ZEROS[: min(left, most_bytes)]
                left -= len(piece)
                most_bytes -= len(piece)
                block.segment.view[block.offset + left : block.offset + left + len(piece)] = piece
            if left:
                self._written[block] = left
            else:
                del self._written[block]
        return bool(self._written)

    def drop_idle(self) -> list[int]:
        """Drop segments that no call has used since the last time. Returns their numbers, for workers to forget.

        Their memory is freed the next time, when workers have forgotten them.
        """
        idle = [segment for segment in self._segments if not segment.blocks_out and not segment.was_used]
        for segment in self._segments:
            segment.was_used = False
        for blocks in self._free.values():
            blocks[:] = [block for block in blocks if block.segment not in idle]
        self._written = {block: end for block, end in self._written.items() if block.segment not in idle}
        for segment in idle:
            self._segments.remove(segment)
        _close(self._dropped)
        self._dropped = idle
        return [segment.number for segment in idle]

    def close(self) -> None:
        """Close all segments."""
        _close(self._segments)
        _close(self._dropped)

    def _grow(self, size_class: int) -> list[Block]:
        size = max(_SEGMENT_BYTES, size_class)
        segment = Segment(next(self._numbers), size, name="unlatch-input", sealed=True)
        self._segments.append(segment)
        blocks = self._free[size_class] = [Block(segment, offset, size_class) for offset in range(0, size, size_class)]
        return blocks


class WorkerSegments:
    """The segments of one worker: input segments that it knows, and reply segments, which it alone writes to.

    The worker learns of each before a run names it, and forgets those that are gone. A reply segment is lent from the
    start of a run until its reply is read. `send` takes a frame for the worker, and a descriptor or None.
    """

    def __init__(self, send: Callable[[Learn | Forget, int | None], None]) -> None:
        self._send = send
        self._known_inputs: set[int] = set()
        self._numbers = count()
        self._free: list[Segment] = []
        # As in the arena.
        self._dropped: list[Segment] = []
        self._closed = False

    def input(self, block: Block | None) -> int:
        """Return the number of the segment that a call's bytes lie in; -1 for a call without bytes."""
        if block is None:
            return _NO_SEGMENT
        segment = block.segment
        if segment.number not in self._known_inputs:
            self._known_inputs.add(segment.number)
            self._send(Learn(segment.number, writable=False), segment.fd)
        return segment.number

    def lend(self) -> Segment:
        """Lend a reply segment whose last reply has been read. Raises ResourceExhausted if there is no memory for one.

        The segment that was used last comes first, because its pages are allocated.
        """
        if self._free:
            segment = self._free.pop()
            segment.was_used = True
        else:
            segment = Segment(next(self._numbers), _FIRST_REPLY_BYTES, name="unlatch-reply", sealed=False)
            self._send(Learn(segment.number, writable=True), segment.fd)
        return segment

    def give_back(self, segment: Segment) -> None:
        """Take a segment back: its reply has been read, or will never be written."""
        if self._closed:
            segment.close()
        else:
            self._free.append(segment)

    def sweep(self, dropped_inputs: Iterable[int]) -> None:
        """Drop reply segments that were not used since the last time. The worker forgets them, and inputs dropped."""
        inputs = [number for number in dropped_inputs if number in self._known_inputs]
        self._known_inputs.difference_update(inputs)
        idle = [segment for segment in self._free if not segment.was_used]
        self._free = [segment for segment in self._free if segment.was_used]
        for segment in self._free:
            segment.was_used = False
        _close(self._dropped)
        self._dropped = idle
        if inputs or idle:
            self._send(Forget(inputs, [segment.number for segment in idle]), None)

    def close(self) -> None:
        """Close all segments of a worker that has ended. Segments still lent are closed when they are given back."""
        self._closed = True
        _close(self._free)
        _close(self._dropped)


def _close(segments: list[Segment]) -> None:
    """Close the segments of a list, and empty it."""
    while segments:
        segments.pop().close()


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
        """Return an input segment."""
        return self._inputs[number]

    def reply(self, number: int, size: int) -> mmap.mmap:
        """Return a reply segment. If it is smaller than `size` bytes, let it grow first."""
        fd, memory = self._replies[number]
        if size > len(memory):
            os.ftruncate(fd, 1 << (size - 1).bit_length())
            memory = mmap.mmap(fd, 0)
            self._replies[number] = (fd, memory)
        return memory
