"""The interface of a receiver of a call's reply, from the lane's caller up to the gateway's doors and the client."""

from collections.abc import Callable
from typing import Protocol

from unlatch.common.errors import UnlatchError
from unlatch.common.lane.body import Body
from unlatch.protos.unlatch_pb2 import Reply

# Counts and logs an exception that no code expected, by the place where it was caught, and returns what to tell the
# caller of the call at hand (common/telemetry/internal_errors.py; the client has its own in unlatch/link.py).
Caught = Callable[[str, BaseException], UnlatchError]


class ReplyListener(Protocol):
    """A receiver of one call's reply. The call ends with the last byte of a reply's body, or with `failed`."""

    def replied(self, reply: Reply, body: Body) -> None:
        """Take a response. Pieces of its body may still be on their way.

        Where the rest of a body cannot be had, `failed` follows, or another response that takes this one's place.
        """

    def failed(self, error: UnlatchError, reply: Reply | None = None, /) -> None:
        """Take the error that ended the call, and the server's reply that told of it, if one did."""
