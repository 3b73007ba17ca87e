"""grpc.health.v1 on a port of its own, in plaintext: kubelets speak no TLS, and admission must not reject a probe.

Ours because grpcio-health-checking's aio servicer loses every other watcher of a service when one leaves, and begins
as SERVING. Protocol: https://github.com/grpc/grpc/blob/master/doc/health-checking.md
"""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

_Status = health_pb2.HealthCheckResponse

# A service of no methods: SERVING as long as somebody answers at all. What asks whether to start the process anew asks
# for it, since a process that has no replica, is overloaded or drains would be no better for a new start.
LIVENESS = "liveness"


class Health(health_pb2_grpc.HealthServicer):
    """One answer for the server as a whole (service "") and each service named: NOT_SERVING until told otherwise."""

    def __init__(self, *services: str) -> None:
        self._services = {"", LIVENESS, *services}
        self._serving = False
        self._ending = False
        self._changed = asyncio.Event()

    def set(self, *, serving: bool) -> None:
        """Say so from now on, to every watcher too."""
        if serving != self._serving and not self._ending:
            self._serving = serving
            self._changed.set()
            self._changed = asyncio.Event()

    def end(self) -> None:
        """NOT_SERVING from now on, whatever `set` is told."""
        self.set(serving=False)
        self._ending = True

    async def until_serving(self) -> None:
        """Wait for it."""
        while not self._serving:
            await self._changed.wait()

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Any) -> health_pb2.HealthCheckResponse:
        """How it stands."""
        if request.service not in self._services:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"service {request.service[:64]!r} is not served here")
        return _Status(status=self._status(request.service))

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, context: Any
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """How it stands, now and whenever it changes."""
        while True:
            changed = self._changed
            yield _Status(status=self._status(request.service))
            await changed.wait()

    def _status(self, service: str) -> Any:
        if service not in self._services:
            return _Status.SERVICE_UNKNOWN
        return _Status.SERVING if self._serving or service == LIVENESS else _Status.NOT_SERVING
