"""The interface of a receiver of a call's reply, and the guard of a lane's ends."""

from collections.abc import Callable
from typing import Protocol, TypeVarTuple

from unlatch.common.errors import UnlatchError
from unlatch.common.lane.body import Body
from unlatch.common.lane.frames import ProtocolViolation
from unlatch.protos.unlatch_pb2 import Reply

# Counts and logs an exception that no code expected, by the place where it was caught, and returns what to tell the
# caller of the call at hand (common/telemetry/internal_errors.py; the client has its own in unlatch/link.py).
Caught = Callable[[str, BaseException], UnlatchError]
Arguments = TypeVarTuple("Arguments")


class CallGuard:
    """The guard of one end of a lane. An exception in a step is counted and logged, and ends one call at most.

    `caught` settles exceptions that no code expected. `fail` ends a call, by its number, with the error that follows.
    """

    __slots__ = ("caught", "fail")

    def __init__(self, caught: Caught, fail: Callable[[int, UnlatchError], None]) -> None:
        self.caught = caught
        self.fail = fail

    def __call__(
        self, place: str, number: int | None, step: Callable[[*Arguments], object], *arguments: *Arguments
    ) -> None:
        """Do a step for the call with this number; None where it is for no call. Raises ProtocolViolation only."""
        try:
            step(*arguments)
        except ProtocolViolation:
            raise
        except Exception as error:  # noqa: BLE001 (the guard: other calls, and the lane, go on)
            told = self.caught(place, error)
            if number is not None:
                self.fail(number, told)


class ReplyListener(Protocol):
    """A receiver of one call's reply. The call ends with the last byte of a reply's body, or with `failed`."""

    def replied(self, reply: Reply, body: Body) -> None:
        """Take a response. Pieces of its body may still be on their way.

        Where the rest of a body cannot be had, `failed` follows, or another response that takes this one's place.
        """

    def failed(self, error: UnlatchError, reply: Reply | None = None, /) -> None:
        """Take the error that ended the call, and the server's reply that told of it, if one did."""
