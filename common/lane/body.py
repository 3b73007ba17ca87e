"""The bytes of a call's or a reply's tensors: whole, or in pieces of which some have not arrived yet.

    feed ──> Body: buffers in order ──┬── Cursor of an outbox        sends pieces on
                                      ├── Cursor of coalescing       digests them
                                      └── Cursor of a door's caller  joins them to one message

A body keeps its buffers for readers to come until its maker lets go. From then on it frees a buffer once every cursor
has passed it. `when_freed` is called when it is let go and has no cursor: memory that it only borrowed may be used
again.
"""

from collections.abc import Callable, Iterable, Sequence

from unlatch.common.lane.frames import ProtocolViolation

# A body up to this size goes beside its frame: one message, no bookkeeping.
WHOLE_BYTES = 64 * 1024

Buffer = bytes | bytearray | memoryview
# A slice that is less than this part of what it is a slice of is copied before it is kept.
_SHARE = 4


def kept(buffer: Buffer) -> Buffer:
    """Return bytes to keep: a copy of a small slice of a large message, which the slice would keep alive.

    So the bytes that are held are no more than some times those that are counted.
    """
    if isinstance(buffer, memoryview) and isinstance(whole := buffer.obj, bytes) and _SHARE * len(buffer) < len(whole):
        return bytes(buffer)
    return buffer


class Arrival:
    """The place in a body of several tensors where the next piece belongs."""

    __slots__ = ("_lengths", "_offset", "_tensor", "missing")

    def __init__(self, lengths: Sequence[int]) -> None:
        self._lengths = lengths
        self._tensor = self._offset = 0
        self.missing = sum(lengths)

    def place(self, size: int) -> tuple[int, int]:
        """Return the tensor, and the offset in it, of the next piece of `size` bytes. Raises ProtocolViolation."""
        while self._tensor < len(self._lengths) and self._offset == self._lengths[self._tensor]:
            self._tensor, self._offset = self._tensor + 1, 0
        if self._tensor == len(self._lengths) or not 0 < size <= self._lengths[self._tensor] - self._offset:
            raise ProtocolViolation("a piece crosses the end of its tensor, or carries nothing")
        at = self._offset
        self._offset += size
        self.missing -= size
        return self._tensor, at


class Body:
    """The bytes of a call's or a reply's tensors, as buffers in order.

    No buffer crosses from one tensor into the next. A body that is complete from the start has one buffer for each
    tensor; a body that arrives in pieces is fed, and wakes its cursors with each piece.
    """

    __slots__ = (
        *("_arrival", "_cursors", "_freed", "_kept", "_when_complete"),
        *("buffers", "lengths", "size", "when_freed"),
    )

    def __init__(self, lengths: Sequence[int], buffers: Iterable[Buffer] | None = None) -> None:
        self.lengths = lengths
        self.size = sum(lengths)
        self.buffers: list[Buffer] = [] if buffers is None else [*buffers]
        self._arrival = Arrival(lengths) if buffers is None and self.size else None
        self._cursors: tuple[Cursor, ...] = ()
        self._when_complete: tuple[Callable[[], None], ...] = ()
        self.when_freed: Callable[[], None] | None = None
        self._kept = True
        # Buffers at the front that were freed. They stay in the list as empty ones, so that cursors' positions hold.
        self._freed = 0

    @property
    def complete(self) -> bool:
        """Whether every byte is here."""
        return self._arrival is None or not self._arrival.missing

    @property
    def whole(self) -> bool:
        """Whether the body is here, and small enough to go beside its frame."""
        return self._arrival is None and self.size <= WHOLE_BYTES and len(self.buffers) == len(self.lengths)

    def feed(self, piece: memoryview) -> None:
        """Take the next piece. Raises ProtocolViolation where it does not fit."""
        if self._arrival is None:
            raise ProtocolViolation("a piece of a body that is already here")
        self._arrival.place(len(piece))
        self.buffers.append(kept(piece))
        for cursor in self._cursors:
            cursor.wake()
        self.free_passed()
        if self.complete:
            told, self._when_complete = self._when_complete, ()
            for tell in told:
                tell()

    def subscribe(self, wake: Callable[[], None]) -> "Cursor":
        """Return a new cursor at the first byte that is still here. `wake` is called whenever more has come."""
        cursor = Cursor(self, wake, self._freed)
        self._cursors += (cursor,)
        return cursor

    def unsubscribe(self, cursor: "Cursor") -> None:
        """Forget a cursor that its reader has closed."""
        self._cursors = tuple(other for other in self._cursors if other is not cursor)
        self.free_passed()

    def when_complete(self, tell: Callable[[], None]) -> None:
        """Have `tell` called once every byte is here. Only for a body that is not complete."""
        self._when_complete += (tell,)

    def let_go(self) -> None:
        """Keep no buffer for readers to come: free what every cursor has passed, now and from now on."""
        self._kept = False
        self.free_passed()

    def free_passed(self) -> None:
        """Free every buffer that all cursors have passed, unless the body is kept."""
        if self._kept:
            return
        if not self._cursors:
            self.buffers = []
            self._freed = 0
            if self.when_freed is not None:
                when_freed, self.when_freed = self.when_freed, None
                when_freed()
            return
        passed = min(cursor.passed for cursor in self._cursors)
        while self._freed < passed:
            self.buffers[self._freed] = b""
            self._freed += 1


class Cursor:
    """The position of one reader in a body. The reader closes it when it needs no more of the body."""

    __slots__ = ("_body", "_offset", "passed", "wake")

    def __init__(self, body: Body, wake: Callable[[], None], at: int) -> None:
        self._body = body
        self.wake = wake
        # Buffers that the reader has been given whole, and how far the reader is in the next one.
        self.passed = at
        self._offset = 0

    @property
    def finished(self) -> bool:
        """Whether the reader has been given every byte of the body."""
        return self._body.complete and self.passed == len(self._body.buffers)

    def next(self, max_bytes: int) -> Buffer | None:
        """Return the next piece, of at most `max_bytes`; None where no more is here now."""
        buffers = self._body.buffers
        while self.passed < len(buffers):
            buffer, start = buffers[self.passed], self._offset
            left = len(buffer) - start
            if left > max_bytes:
                self._offset = start + max_bytes
                return memoryview(buffer)[start : self._offset]
            self._offset = 0
            self.passed += 1
            self._body.free_passed()
            if left:
                return memoryview(buffer)[start:] if start else buffer
        return None

    def close(self) -> None:
        """Read no more. Breaks the circle of body, cursor and reader, which the garbage collector would break late."""
        self.wake = _ignore
        self._body.unsubscribe(self)


def _ignore() -> None:
    """Wake the reader of a closed cursor: there is none."""
