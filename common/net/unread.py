"""Answers, and messages of lanes, that gRPC has taken and not sent yet, because their callers do not read.

grpc.aio tells when an answer has been sent, but it cannot end an RPC whose answer is not: an error would wait behind
the answer. So the connection of a caller who does not read is closed, which ends every RPC on it. Who the caller of a
Unix socket is cannot be seen: its connections stay open, and its answers stay counted.
"""

from collections.abc import Sequence
from typing import Any

import structlog

from unlatch.common.net.sockets import disconnect
from unlatch.common.overdue import Overdue

log = structlog.get_logger()


def unread_answers(seconds: float) -> Overdue[Any]:
    """Return the RPCs with an answer on its way, by their contexts. Who reads none for `seconds` is disconnected."""
    return Overdue(seconds, _disconnect)


def _disconnect(contexts: Sequence[Any]) -> None:
    callers = {context.peer() for context in contexts}
    log.warning("callers do not read and are disconnected", callers=len(callers), peer=min(callers))
    disconnect(callers)
