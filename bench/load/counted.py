"""A channel whose lanes count the answers to each call.

A lane's caller takes a call's first answer and ignores any that follow. Here a second answer is noticed.
"""

from collections.abc import Awaitable, Callable
from typing import Any

import grpc.aio

from unlatch.common.lane.frames import unpack

_MAX_TOLD = 20


class Answers:
    """The answers on one lane.

    A call has one answer: a response with all bytes, or a failure, or a response and a failure before its last byte.
    """

    def __init__(self) -> None:
        # Missing bytes of a call's response, by the call's number; None once the call has failed.
        self._wanted: dict[int, int | None] = {}
        self.wrong: list[str] = []

    def __len__(self) -> int:
        return len(self._wanted)

    def note(self, message: bytes) -> None:
        """Count the answers in a message."""
        arrived = unpack(message)
        for reply, lengths, whole in arrived.bodied(arrived.frames.replies):
            failed = reply.HasField("failure")
            before = self._wanted.get(reply.call, ...)
            if before is None or (before is not ... and not (failed and before)):
                self._tell(f"call {reply.call} was answered twice")
            self._wanted[reply.call] = None if failed else 0 if whole is not None else sum(lengths)
        for number, piece in arrived.pieces():
            wanted = self._wanted.get(number)
            if wanted is None or wanted < len(piece):
                self._tell(f"call {number} got {len(piece)} bytes where {wanted} were wanted")
            else:
                self._wanted[number] = wanted - len(piece)

    def _tell(self, what: str) -> None:
        if len(self.wrong) < _MAX_TOLD:
            self.wrong.append(what)


class CountedChannel:
    """The part of a channel that opens a lane and closes. Each lane adds its answers to `answers`."""

    def __init__(self, channel: grpc.aio.Channel, answers: list[Answers]) -> None:
        self._channel = channel
        self.answers = answers

    async def close(self) -> None:
        """Close the channel."""
        await self._channel.close()

    def stream_stream(self, method: str) -> Callable[..., "CountedStream"]:
        """Open a lane's stream with a count of its own, since each lane numbers its calls from 1."""
        opening: Any = self._channel.stream_stream(method)

        def opened(**options: Any) -> CountedStream:
            self.answers.append(Answers())
            return CountedStream(opening(**options), self.answers[-1])

        return opened


class CountedStream:
    """A lane's stream."""

    def __init__(self, stream: Any, answers: Answers) -> None:
        self._stream = stream
        self._answers = answers
        self.cancel, self.done_writing = stream.cancel, stream.done_writing

    def write(self, message: bytes) -> Awaitable[None]:
        written: Awaitable[None] = self._stream.write(message)
        return written

    async def read(self) -> object:
        message: object = await self._stream.read()
        if isinstance(message, bytes):
            self._answers.note(message)
        return message
