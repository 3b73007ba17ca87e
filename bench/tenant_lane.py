"""A lane directly to a dispatcher, which trusts the tenant that each call names."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import grpc.aio

from unlatch.arrays import RequestBuilder, arrays
from unlatch.common.errors import UnlatchError
from unlatch.common.kernel.messages import from_message
from unlatch.common.kernel.spec import KernelSpec
from unlatch.common.lane.body import Body
from unlatch.common.lane.caller import LaneCaller
from unlatch.common.lane.frames import METHOD
from unlatch.common.telemetry.internal_errors import InternalErrors
from unlatch.common.telemetry.recorder import Recorder
from unlatch.protos.unlatch_pb2 import Reply, Welcome


class TenantLane:
    """Calls for any tenant, of kernels that take no arrays and return a small one."""

    def __init__(self) -> None:
        self.caller = LaneCaller(self._welcomed, lambda: None, InternalErrors(Recorder()).caught)
        self.welcomed = asyncio.Event()
        self._kernels: dict[str, KernelSpec] = {}

    async def call(self, kernel: str, tenant: str) -> Any:
        """Call a kernel and return its array. Raises UnlatchError."""
        descriptor, body = RequestBuilder(self._kernels[kernel], {}).request(())
        descriptor.tenant = tenant
        answer = _Answer()
        self.caller.call(descriptor, body, answer)
        return await answer.result

    def _welcomed(self, welcome: Welcome) -> None:
        self._kernels = {kernel.name: from_message(kernel) for kernel in welcome.kernels}
        self.welcomed.set()


class _Answer:
    def __init__(self) -> None:
        self.result: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    def replied(self, reply: Reply, body: Body) -> None:
        """Take the reply; small arrays come with it."""
        if not self.result.done():
            self.result.set_result(arrays(reply.response.tensors, list(map(bytearray, body.buffers)), ())[0])

    def failed(self, error: UnlatchError, _: Reply | None = None) -> None:
        if not self.result.done():
            self.result.set_exception(error)


@asynccontextmanager
async def tenant_lane(target: str) -> AsyncIterator[TenantLane]:
    """Open such a lane."""
    async with grpc.aio.insecure_channel(target) as channel:
        lane = TenantLane()
        stream: Any = channel.stream_stream(METHOD)()
        running = asyncio.create_task(lane.caller.run(stream))
        await lane.welcomed.wait()
        try:
            yield lane
        finally:
            running.cancel()
            with suppress(asyncio.CancelledError):
                await running
