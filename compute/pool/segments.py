"""The segments that one worker knows: it learns of each before a run names it, and forgets those that are gone."""

from collections.abc import Callable, Iterable

from unlatch.compute.call import Call
from unlatch.compute.ipc.arena import ReplySegments, Segment
from unlatch.compute.ipc.frames import Forget, Learn

_NONE = -1


class KnownSegments:
    """Input segments, which all workers share, and reply segments, which this worker alone writes to.

    `send` takes a frame for the worker, and the descriptor that goes with it or None.
    """

    def __init__(self, send: Callable[[Learn | Forget, int | None], None]) -> None:
        self._send = send
        self.replies = ReplySegments()
        self._known_inputs: set[int] = set()
        self._known_replies: set[int] = set()

    def reply(self) -> Segment:
        """A segment that the worker may write replies to. Raises ResourceExhausted where there is no memory for one."""
        segment = self.replies.lend()
        if segment.number not in self._known_replies:
            self._known_replies.add(segment.number)
            self._send(Learn(segment.number, writable=True), segment.fd)
        return segment

    def input(self, call: Call) -> int:
        """The number of the segment that a call's bytes lie in, which the worker knows from now on; -1 for none."""
        if call.block is None:
            return _NONE
        segment = call.block.segment
        if segment.number not in self._known_inputs:
            self._known_inputs.add(segment.number)
            self._send(Learn(segment.number, writable=False), segment.fd)
        return segment.number

    def sweep(self, dropped_inputs: Iterable[int]) -> None:
        """Let the worker forget inputs that are gone, and replies that it has not needed for a while."""
        inputs = [number for number in dropped_inputs if number in self._known_inputs]
        replies = self.replies.drop_idle()
        self._known_inputs.difference_update(inputs)
        self._known_replies.difference_update(replies)
        if inputs or replies:
            self._send(Forget(inputs, replies), None)

    def close(self) -> None:
        """Free the replies' memory once it has been read, because the worker has exited."""
        self.replies.close()
