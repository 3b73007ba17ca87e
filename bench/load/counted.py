"""A channel whose lanes count the answers to each call.

A lane's caller ignores what follows the end of a call's answer. Here a second answer is noticed.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc.aio

from unlatch.common.lane.frames import unpack

_MAX_TOLD = 20


@dataclass(slots=True)
class _Answer:
    """The answer to a call: its bytes in all, those that have not come yet, and whether the call has failed."""

    size: int
    missing: int
    failed: bool

    @property
    def ended(self) -> bool:
        """Whether nothing may follow."""
        return self.failed or not self.missing


class Answers:
    """The answers on one lane, as its contract has them (protos/unlatch.proto).

    A call has one answer: a response with all bytes, or a failure, or a response and a failure before its last byte.
    Where `replicas_die`, the rest of a response may be lost with its replica. If the kernel is pure, another response
    of the same size then takes its place: `replaced` counts these.
    """

    def __init__(self, *, replicas_die: bool = False) -> None:
        self._replicas_die = replicas_die
        self._pure: set[str] = set()
        # The kernel and the answer of each call, by the call's number.
        self._kernels: dict[int, str] = {}
        self._answers: dict[int, _Answer] = {}
        self.replaced = 0
        self.wrong: list[str] = []

    def __len__(self) -> int:
        return len(self._answers)

    def asked(self, message: bytes) -> None:
        """Note the calls in a message to the server."""
        for call in unpack(message).frames.calls:
            self._kernels[call.call] = call.request.kernel

    def note(self, message: bytes) -> None:
        """Count the answers in a message from the server."""
        arrived = unpack(message)
        if arrived.frames.HasField("welcome"):
            self._pure.update(kernel.name for kernel in arrived.frames.welcome.kernels if kernel.pure)
        for reply, lengths, whole in arrived.bodied(arrived.frames.replies):
            size = sum(lengths)
            self._take(reply.call, _Answer(size, 0 if whole is not None else size, reply.HasField("failure")))
        for number, piece in arrived.pieces():
            answer = self._answers.get(number)
            if answer is None or answer.failed or answer.missing < len(piece):
                wanted = 0 if answer is None or answer.failed else answer.missing
                self._tell(f"call {number} got {len(piece)} bytes where {wanted} were wanted")
            else:
                answer.missing -= len(piece)

    def _take(self, number: int, answer: _Answer) -> None:
        before = self._answers.get(number)
        self._answers[number] = answer
        if before is None:
            return
        if before.ended:
            self._tell(f"call {number} was answered twice")
        elif not answer.failed:
            self._replace(number, before, answer)

    def _replace(self, number: int, before: _Answer, answer: _Answer) -> None:
        """Check that a response may take the place of one whose last byte has not come."""
        self.replaced += 1
        kernel = self._kernels.get(number, "")
        which = f"the response to call {number}, of which {before.missing} of {before.size} bytes were missing,"
        if not self._replicas_die:
            self._tell(f"{which} was replaced, and no replica died")
        elif kernel not in self._pure:
            self._tell(f"{which} was replaced, and its kernel {kernel} is not pure")
        elif answer.size != before.size:
            self._tell(f"{which} was replaced by one of {answer.size} bytes")

    def _tell(self, what: str) -> None:
        if len(self.wrong) < _MAX_TOLD:
            self.wrong.append(what)


class CountedChannel:
    """The part of a channel that opens a lane and closes. Each lane adds its answers to `answers`."""

    def __init__(self, channel: grpc.aio.Channel, answers: list[Answers], *, replicas_die: bool = False) -> None:
        self._channel = channel
        self._replicas_die = replicas_die
        self.answers = answers

    async def close(self) -> None:
        """Close the channel."""
        await self._channel.close()

    def stream_stream(self, method: str) -> Callable[..., "CountedStream"]:
        """Open a lane's stream with a count of its own, since each lane numbers its calls from 1."""
        opening: Any = self._channel.stream_stream(method)

        def opened(**options: Any) -> CountedStream:
            self.answers.append(Answers(replicas_die=self._replicas_die))
            return CountedStream(opening(**options), self.answers[-1])

        return opened


class CountedStream:
    """A lane's stream."""

    def __init__(self, stream: Any, answers: Answers) -> None:
        self._stream = stream
        self._answers = answers
        self.cancel, self.done_writing = stream.cancel, stream.done_writing

    def write(self, message: bytes) -> Awaitable[None]:
        self._answers.asked(message)
        written: Awaitable[None] = self._stream.write(message)
        return written

    async def read(self) -> object:
        message: object = await self._stream.read()
        if isinstance(message, bytes):
            self._answers.note(message)
        return message
