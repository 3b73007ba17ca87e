"""The bound on connections: as many as there are descriptors for, and a warning when it is reached.

gRPC closes a connection over its bound at once, without a word and without a count. If it had no descriptor left, it
would leave the connection waiting.
"""

import asyncio
from typing import Never

import structlog

from unlatch.common.machine.descriptors import descriptor_limit, open_descriptors
from unlatch.common.net.ports import BindError, connections
from unlatch.common.telemetry.recorder import Recorder

log = structlog.get_logger()

_LOOK_SECONDS = 1.0
# Kept for lanes to replicas, shared memory, files, scrapes and probes.
_MIN_SPARE, _SPARE_SHARE = 16, 8


def connection_bound(max_connections: int) -> int:
    """The number of connections that this process has descriptors for. Raises BindError if it is 0.

    To be called when all other descriptors are open.
    """
    limit = descriptor_limit()
    bound = min(max_connections, limit - open_descriptors() - max(_MIN_SPARE, limit // _SPARE_SHARE))
    if bound < 1:
        raise BindError(f"the limit of {limit} descriptors leaves none for connections: raise it (ulimit -n)")
    if bound < max_connections:
        log.warning("fewer connections than max_connections", connections=bound, descriptor_limit=limit)
    return bound


class ConnectionWatch:
    """Watches the connections to an address, of which there are `bound` at most."""

    def __init__(self, address: str, bound: int, recorder: Recorder) -> None:
        self._address = address
        self._bound = bound
        recorder.gauge("unlatch_connections", "Connections to --listen.", read=lambda: connections(address))
        recorder.gauge("unlatch_max_connections", "Connections to --listen beyond which more are closed.").set(bound)
        self._full_seconds = recorder.counter(
            "unlatch_connections_full_seconds_total", "Seconds in which connections beyond the bound were closed."
        )

    async def run(self) -> Never:
        """Log when the bound is reached, and count for how long, for ever."""
        was_full = False
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            # Connections are counted only if they can be as many: all of this machine's have to be read.
            full = open_descriptors() >= self._bound <= connections(self._address)
            if full:
                self._full_seconds.add(_LOOK_SECONDS)
            if full and not was_full:
                log.warning("connections at their bound, more are closed", connections=self._bound)
            was_full = full
