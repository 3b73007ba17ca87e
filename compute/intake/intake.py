"""The serving end of lanes: a descriptor becomes a call, its arguments checked and its bytes landing in the arena."""

from unlatch.common.errors import ResourceExhausted, UnlatchError, no_kernel
from unlatch.common.kernel.spec import KernelSpec
from unlatch.common.lane.body import Body
from unlatch.common.lane.replies import failed
from unlatch.common.lane.server import LaneServer
from unlatch.common.telemetry.tracing import Tracing
from unlatch.compute.call import Call
from unlatch.compute.dispatch.queue import Queue
from unlatch.compute.intake.arguments import check
from unlatch.compute.intake.poison import Suspects
from unlatch.compute.ipc.arena import InputArena
from unlatch.compute.metrics import ComputeMetrics
from unlatch.protos.unlatch_pb2 import Descriptor

_UNKNOWN = "unknown"


class Door:
    """Takes in what lanes bring: `accept` is what each lane calls for each descriptor."""

    def __init__(
        self,
        kernels: dict[str, KernelSpec],
        arena: InputArena,
        queue: Queue,
        suspects: Suspects,
        metrics: ComputeMetrics,
        tracing: Tracing,
        max_call_bytes: int,
    ) -> None:
        self._kernels = kernels
        self._arena = arena
        self._queue = queue
        self._suspects = suspects
        self._metrics = metrics
        self._tracing = tracing
        self._max_call_bytes = max_call_bytes

    def accept(self, lane: LaneServer, descriptor: Descriptor, whole: list[memoryview] | None) -> Call | None:
        """A descriptor becomes a call that waits for its bytes or for a worker, or is refused at once."""
        try:
            call = self._call(lane, descriptor)
        except UnlatchError as error:
            kernel = descriptor.request.kernel
            known = kernel if kernel in self._kernels else _UNKNOWN
            self._metrics.call_ended(known, error.status)
            lane.reply(descriptor.call, failed(error), Body((), []))
            return None
        if whole is not None:
            call.land(whole)
        elif call.complete:
            call.land(())
        return None if call.ended else call

    def _call(self, lane: LaneServer, descriptor: Descriptor) -> Call:
        spec = self._spec(descriptor.request.kernel, descriptor.request.version)
        size = sum(descriptor.lengths[:])
        if size > self._max_call_bytes:
            raise ResourceExhausted(
                f"the call's tensors are {size} bytes, more than max_call_bytes={self._max_call_bytes}"
            )
        arguments = check(spec, descriptor)
        beside = self._arena, self._metrics, self._tracing
        call = Call(lane, descriptor, spec, arguments, *beside, self._suspects.offer, self._suspects.withdraw)
        self._queue.admit(call)
        try:
            call.make_room()
        except ResourceExhausted as error:
            raise self._queue.full(error.message) from error
        return call

    def _spec(self, name: str, version: str) -> KernelSpec:
        spec = self._kernels.get(name)
        if spec is not None and version in ("", spec.version):
            return spec
        raise no_kernel(name, version, {spec.name: spec.version for spec in self._kernels.values()})
