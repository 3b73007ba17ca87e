"""The arena: blocks that are allocated, freed and allocated again, and seals that a worker cannot break."""

import errno
import mmap
import os
import threading
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.watching import memory_files, wait_until
from unlatch.common.errors import ResourceExhausted
from unlatch.compute.ipc import arena as arena_module
from unlatch.compute.ipc.arena import (
    ALIGNMENT,
    Block,
    InputArena,
    Mapped,
    Segment,
    WorkerSegments,
    aligned,
    offsets,
)
from unlatch.compute.ipc.frames import Forget, Learn

KIBIBYTE, MEBIBYTE = 1024, 1024 * 1024


@given(st.lists(st.integers(0, 10_000), max_size=8))
def test_tensors_lie_apart_on_boundaries(lengths: list[int]) -> None:
    """Each tensor starts on a 64-byte boundary after the end of the one before.

    All lie within the size that they need together.
    """
    starts, size = offsets(lengths)
    ends = [start + length for start, length in zip(starts, lengths, strict=True)]
    assert all(start % ALIGNMENT == 0 for start in starts)
    assert all(end <= start for end, start in zip(ends, starts[1:], strict=False))
    assert max(ends, default=0) <= size <= sum(map(aligned, lengths))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.one_of(st.integers(1, 300_000), st.none()), max_size=60), st.randoms())
def test_blocks_never_overlap(steps: list[int | None], chosen: Random) -> None:
    """Live blocks do not overlap, are aligned and lie in their segments, in whatever order blocks come and go."""
    arena = InputArena(64 * MEBIBYTE)
    live: list[Block] = []
    for size in steps:
        if size is not None:
            live.append(arena.allocate(size))
        elif live:
            arena.free(live.pop(chosen.randrange(len(live))))
        assert arena.used_bytes == sum(block.size for block in live)
        spans = sorted((block.segment.number, block.offset, block.offset + block.size) for block in live)
        assert all(one[0] != two[0] or one[2] <= two[1] for one, two in pairwise(spans))
        assert all(b.offset % ALIGNMENT == 0 and b.offset + b.size <= b.segment.size for b in live)
    arena.close()


def test_freed_room_is_used_again() -> None:
    """A thousand calls one after another need one segment."""
    arena = InputArena(8 * MEBIBYTE)
    seen = set()
    for _ in range(1000):
        block = arena.allocate(100 * KIBIBYTE)
        seen.add(block.segment.number)
        arena.free(block)
    assert len(seen) == 1
    arena.close()


def test_limit_counts_what_is_held() -> None:
    """A request beyond the limit is refused, and the message has the limit. Freed room can be allocated again."""
    arena = InputArena(1 * MEBIBYTE)
    blocks = [arena.allocate(256 * KIBIBYTE) for _ in range(4)]
    with pytest.raises(ResourceExhausted, match="input_arena_bytes=1048576"):
        arena.allocate(1)
    arena.free(blocks.pop())
    arena.free(arena.allocate(256 * KIBIBYTE))
    arena.close()


def test_idle_segments_are_dropped_and_no_others() -> None:
    """A segment is dropped at the second sweep without use. A segment with a live block stays, with its bytes."""
    arena = InputArena(64 * MEBIBYTE)
    kept, idle = arena.allocate(100), arena.allocate(MEBIBYTE)
    kept.segment.view[kept.offset : kept.offset + 4] = b"kept"
    arena.free(idle)
    assert arena.drop_idle() == []
    assert arena.drop_idle() == [idle.segment.number]
    assert arena.drop_idle() == []
    assert bytes(kept.segment.view[kept.offset : kept.offset + 4]) == b"kept"
    again = arena.allocate(MEBIBYTE)
    assert again.segment.number != idle.segment.number
    arena.close()


@pytest.mark.parametrize("size", [1, 4096, 64 * KIBIBYTE, 100 * KIBIBYTE, 3 * MEBIBYTE])
def test_inputs_of_ended_calls_are_overwritten(size: int) -> None:
    """A worker's map has nothing of a small call once it has ended, and nothing of a large one soon after."""
    arena = InputArena(64 * MEBIBYTE)
    block = arena.allocate(size)
    kept = arena.allocate(size)
    mapped = Mapped()
    for segment in {block.segment, kept.segment}:
        mapped.learn_input(segment.number, os.dup(segment.fd))

    def seen(of: Block) -> bytes:
        return bytes(mapped.input(of.segment.number)[of.offset : of.offset + size])

    for of in (block, kept):
        of.segment.view[of.offset : of.offset + size] = b"s" * size
    arena.free(block)
    if size > 64 * KIBIBYTE:
        # A smaller call takes the block, and leaves the rest of it as it was.
        assert arena.allocate(70 * KIBIBYTE if size < MEBIBYTE else 2 * MEBIBYTE + 1) is block
        block.segment.view[block.offset : block.offset + 4] = b"live"
        arena.wipe(64 * MEBIBYTE)
        assert seen(block)[:4] == b"live"
        arena.free(block)
        arena.wipe(size - 1)
        assert seen(block) == b"l" + bytes(size - 1)
        arena.wipe(size)
    assert seen(block) == bytes(size)
    assert seen(kept) == b"s" * size
    arena.wipe(64 * MEBIBYTE)
    assert not arena._written
    arena.close()


def test_dropped_segments_need_no_overwriting() -> None:
    """A segment may be dropped before its blocks are overwritten: its memory is freed."""
    arena = InputArena(64 * MEBIBYTE)
    arena.free(arena.allocate(MEBIBYTE))
    arena.drop_idle()
    assert len(arena.drop_idle()) == 1
    arena.wipe(64 * MEBIBYTE)
    arena.close()


def test_worker_reads_what_the_dispatcher_writes() -> None:
    """A worker reads through its own mapping, at any time after the write."""
    arena = InputArena(MEBIBYTE)
    block = arena.allocate(100)
    mapped = Mapped()
    mapped.learn_input(block.segment.number, os.dup(block.segment.fd))
    block.segment.view[block.offset : block.offset + 5] = b"later"
    memory = mapped.input(block.segment.number)
    assert memory[block.offset : block.offset + 5] == b"later"
    with pytest.raises(TypeError, match=r"readonly|read-only"):
        memory[block.offset] = 0
    arena.close()


def test_sealed_segment_cannot_be_mapped_for_writing() -> None:
    """No new mapping for writing can be made, through the descriptor or through a new one from /proc."""
    arena = InputArena(MEBIBYTE)
    segment = arena.allocate(100).segment
    with pytest.raises(PermissionError):
        mmap.mmap(segment.fd, segment.size)
    with pytest.raises(PermissionError):
        os.pwrite(segment.fd, b"scribble", 0)
    again = os.open(f"/proc/self/fd/{segment.fd}", os.O_RDWR)
    try:
        with pytest.raises(PermissionError):
            mmap.mmap(again, segment.size)
    finally:
        os.close(again)
    segment.view[:4] = b"mine"
    arena.close()


@pytest.mark.parametrize("size", [0, 4096, 1 << 40])
def test_sealed_segment_keeps_its_size(size: int) -> None:
    """A sealed segment cannot be truncated, which would kill its readers, and cannot grow."""
    arena = InputArena(MEBIBYTE)
    segment = arena.allocate(100).segment
    with pytest.raises(PermissionError):
        os.ftruncate(segment.fd, size)
    with pytest.raises(PermissionError):
        os.truncate(f"/proc/self/fd/{segment.fd}", size)
    arena.close()


def test_reply_segment_can_grow_but_not_shrink() -> None:
    """A worker enlarges a segment for a large reply, and the dispatcher follows.

    Neither can lose a byte by truncation.
    """
    replies = WorkerSegments(lambda _, __: None)
    segment = replies.lend()
    mapped = Mapped()
    mapped.learn_reply(segment.number, os.dup(segment.fd))
    first = segment.view
    mapped.reply(segment.number, 10)[:5] = b"small"
    assert bytes(first[:5]) == b"small"
    mapped.reply(segment.number, 3 * MEBIBYTE)[3 * MEBIBYTE - 3 : 3 * MEBIBYTE] = b"end"
    segment.follow_growth_to(3 * MEBIBYTE)
    assert bytes(segment.view[3 * MEBIBYTE - 3 : 3 * MEBIBYTE]) == b"end"
    assert bytes(first[:5]) == b"small"
    with pytest.raises(PermissionError) as refused:
        os.ftruncate(segment.fd, 0)
    assert refused.value.errno == errno.EPERM
    mapped.forget([], [segment.number])
    replies.give_back(segment)
    replies.close()


def test_dispatcher_follows_no_further_than_there_is() -> None:
    """A worker that claims more than it has made does not change the segment."""
    replies = WorkerSegments(lambda _, __: None)
    segment = replies.lend()
    size = segment.size
    segment.follow_growth_to(1 << 60)
    assert segment.size == size
    replies.give_back(segment)
    replies.close()


def test_reply_segments_are_lent_one_at_a_time() -> None:
    """Two segments that are lent are different.

    A returned one is lent next, and an idle one goes at the second sweep.
    """
    told: list[Learn | Forget] = []
    replies = WorkerSegments(lambda frame, _: told.append(frame))
    one, two = replies.lend(), replies.lend()
    assert one.number != two.number
    assert told == [Learn(one.number, writable=True), Learn(two.number, writable=True)]
    replies.give_back(one)
    assert replies.lend() is one
    replies.give_back(one)
    replies.give_back(two)
    replies.sweep([])
    assert replies.lend() is two
    assert len(told) == 2
    replies.sweep([])
    assert told[2:] == [Forget([], [one.number])]
    replies.close()
    replies.give_back(two)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(two.fd)


def test_closing_leaves_no_descriptor() -> None:
    """Every memfd is closed with the arena."""
    # Only memfds count: threads of gRPC, which other tests have started here, may open sockets at any time.
    before = memory_files([os.getpid()])
    arena = InputArena(64 * MEBIBYTE)
    for size in (1, 5000, MEBIBYTE, 20 * MEBIBYTE):
        arena.allocate(size)
    assert memory_files([os.getpid()]) - before
    arena.close()
    wait_until(lambda: not memory_files([os.getpid()]) - before, "none is left")


def test_dropped_segments_are_freed_when_workers_have_forgotten_them() -> None:
    """The file stays open until the next sweep, so that no worker is the last to have it, and frees its pages."""
    before = memory_files([os.getpid()])
    arena = InputArena(64 * MEBIBYTE)
    arena.free(arena.allocate(MEBIBYTE))
    assert [len(arena.drop_idle()) for _ in range(2)] == [0, 1]
    assert memory_files([os.getpid()]) - before
    assert arena.drop_idle() == []
    assert not memory_files([os.getpid()]) - before


def test_large_segments_are_freed_while_their_owner_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system takes 12 ms to free 64 MiB: a thread waits for that. A small segment is closed at once."""
    go_on, freed = threading.Event(), arena_module._free_slowly

    def free(memory: list[mmap.mmap], fd: int | None) -> None:
        go_on.wait(10.0)
        freed(memory, fd)

    monkeypatch.setattr(arena_module, "_free_slowly", free)
    before = memory_files([os.getpid()])
    small, large = (
        Segment(number, size * MEBIBYTE, name="unlatch-input", sealed=True) for number, size in enumerate((4, 20))
    )
    small.close()
    large.close()
    assert len(memory_files([os.getpid()]) - before) == 1
    go_on.set()
    wait_until(lambda: not memory_files([os.getpid()]) - before, "it is closed")
