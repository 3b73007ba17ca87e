"""grpc.health.v1 on a port of its own, in plaintext: kubelets speak no TLS, and admission must not reject a probe.

This is our own servicer, because the asynchronous one of grpcio-health-checking loses all other watchers of a service
when one leaves, and starts as SERVING. Protocol: https://github.com/grpc/grpc/blob/master/doc/health-checking.md
"""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

_Status = health_pb2.HealthCheckResponse

# A service without methods, SERVING as long as the process answers at all. Liveness probes ask for it: a restart would
# not help a process that has no replica, is overloaded, or drains.
LIVENESS = "liveness"


class Health(health_pb2_grpc.HealthServicer):
    """The health of the server as a whole (service "") and of each named service, at first NOT_SERVING."""

    def __init__(self, *services: str) -> None:
        self._services = {"", LIVENESS, *services}
        self._serving = False
        self._ending = False
        self._changed = asyncio.Event()

    def set(self, *, serving: bool) -> None:
        """Change the state, and tell every watcher."""
        if serving != self._serving and not self._ending:
            self._serving = serving
            self._changed.set()
            self._changed = asyncio.Event()

    def end(self) -> None:
        """Stay NOT_SERVING from now on; later calls of `set` have no effect."""
        self.set(serving=False)
        self._ending = True

    async def until_serving(self) -> None:
        """Wait until the state is SERVING."""
        while not self._serving:
            await self._changed.wait()

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Any) -> health_pb2.HealthCheckResponse:
        """Return the present state."""
        if request.service not in self._services:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"service {request.service[:64]!r} is not served here")
        return _Status(status=self._status(request.service))

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, context: Any
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """Return the present state, and each later change."""
        while True:
            changed = self._changed
            yield _Status(status=self._status(request.service))
            await changed.wait()

    def _status(self, service: str) -> Any:
        if service not in self._services:
            return _Status.SERVICE_UNKNOWN
        return _Status.SERVING if self._serving or service == LIVENESS else _Status.NOT_SERVING
