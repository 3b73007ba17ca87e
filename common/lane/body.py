"""The bytes of a call's or a reply's tensors: whole, or in pieces of which some are still on their way."""

from collections.abc import Callable, Sequence
from typing import Protocol

from unlatch.common.lane.frames import ProtocolViolation

# A body up to this size goes beside its frame: one message, no bookkeeping.
WHOLE_BYTES = 64 * 1024

Buffer = bytes | bytearray | memoryview


class Sink(Protocol):
    """Where a body's pieces go as they arrive."""

    @property
    def complete(self) -> bool:
        """Whether every byte is here."""

    def feed(self, piece: memoryview) -> None:
        """Take the next piece. Raises ProtocolViolation where it does not fit."""


class Arrival:
    """Where in a body of several tensors the next piece belongs."""

    __slots__ = ("_lengths", "_offset", "_tensor", "missing")

    def __init__(self, lengths: Sequence[int]) -> None:
        self._lengths = lengths
        self._tensor = self._offset = 0
        self.missing = sum(lengths)

    def place(self, size: int) -> tuple[int, int]:
        """The tensor, and the offset in it, of a next piece of `size` bytes. Raises ProtocolViolation."""
        while self._tensor < len(self._lengths) and self._offset == self._lengths[self._tensor]:
            self._tensor, self._offset = self._tensor + 1, 0
        if self._tensor == len(self._lengths) or not 0 < size <= self._lengths[self._tensor] - self._offset:
            raise ProtocolViolation("a piece crosses the end of its tensor, or carries nothing")
        at = self._offset
        self._offset += size
        self.missing -= size
        return self._tensor, at


class Body:
    """The bytes of a call's or a reply's tensors: buffers in order, of which some may still be on their way.

    None crosses from one tensor into the next. A body that is complete from the start has one buffer a tensor; one that
    arrives piece by piece is fed, and passes each piece on to whoever has asked `on_more`.
    """

    __slots__ = ("_arrival", "buffers", "lengths", "on_more", "size")

    def __init__(self, lengths: Sequence[int], buffers: list[Buffer] | None = None) -> None:
        self.lengths = lengths
        self.size = sum(lengths)
        self.buffers: list[Buffer] = [] if buffers is None else buffers
        self._arrival = Arrival(lengths) if buffers is None and self.size else None
        self.on_more: Callable[[], None] | None = None

    @property
    def complete(self) -> bool:
        """Whether every byte is here."""
        return self._arrival is None or not self._arrival.missing

    @property
    def whole(self) -> bool:
        """Whether it is here, and small enough to go beside its frame."""
        return self._arrival is None and self.size <= WHOLE_BYTES and len(self.buffers) == len(self.lengths)

    def feed(self, piece: memoryview) -> None:
        """Take the next piece. Raises ProtocolViolation where it does not fit."""
        if self._arrival is None:
            raise ProtocolViolation("a piece of a body that is already here")
        self._arrival.place(len(piece))
        self.buffers.append(piece)
        if self.on_more is not None:
            self.on_more()
