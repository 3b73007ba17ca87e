"""The intake of calls: make a descriptor from a lane a call, with checked arguments and room for its bytes."""

from collections.abc import Callable

from unlatch.common.errors import ResourceExhausted, UnlatchError, no_kernel
from unlatch.common.kernel.spec import KernelSpec
from unlatch.common.lane.frames import ProtocolViolation
from unlatch.common.lane.server import ServingEnd
from unlatch.common.telemetry.internal_errors import InternalErrors
from unlatch.common.telemetry.tracing import Tracing
from unlatch.compute.call import Call
from unlatch.compute.dispatch.dispatcher import Dispatcher
from unlatch.compute.dispatch.outcomes import Fail
from unlatch.compute.intake.arguments import check
from unlatch.compute.ipc.arena import InputArena
from unlatch.compute.metrics import ComputeMetrics
from unlatch.protos.unlatch_pb2 import Descriptor

_UNKNOWN = "unknown"


class CallIntake:
    """Accepts calls from lanes. Each lane calls `accept` for each descriptor that arrives.

    `dispatcher_of` returns the dispatcher for a kernel's calls, or raises an UnlatchError if there is none.
    """

    def __init__(
        self,
        kernels: dict[str, KernelSpec],
        arena: InputArena,
        dispatcher_of: Callable[[KernelSpec], Dispatcher],
        metrics: ComputeMetrics,
        tracing: Tracing,
        errors: InternalErrors,
        max_call_bytes: int,
    ) -> None:
        self._kernels = kernels
        self._arena = arena
        self._dispatcher_of = dispatcher_of
        self._metrics = metrics
        self._tracing = tracing
        self._errors = errors
        self._max_call_bytes = max_call_bytes

    def accept(self, lane: ServingEnd, descriptor: Descriptor, whole: list[memoryview] | None) -> Call | None:
        """Make a descriptor a call that waits for its bytes or for a worker, or refuse it at once.

        `whole` has the bytes of all tensors; None if they arrive later, in pieces (`Call.feed`). Returns None for a
        call that has ended already.
        """
        call = None
        try:
            call = self._call(lane, descriptor)
            if whole is not None or call.complete:
                call.land(whole or ())
        except ProtocolViolation:
            raise
        except Exception as error:  # noqa: BLE001 (an entry point's guard: the lane and its other calls go on)
            refusal = error if isinstance(error, UnlatchError) else self._errors.caught("lane_accept", error)
            if call is None:
                self._refuse(lane, descriptor, refusal)
            else:
                self._dispatcher_of(call.spec).settle(call, Fail(refusal))
            return None
        return None if call.ended else call

    def _refuse(self, lane: ServingEnd, descriptor: Descriptor, error: UnlatchError) -> None:
        kernel = descriptor.request.kernel
        self._metrics.call_ended(kernel if kernel in self._kernels else _UNKNOWN, error.status)
        lane.fail(descriptor.call, error)

    def _call(self, lane: ServingEnd, descriptor: Descriptor) -> Call:
        spec = self._spec(descriptor.request.kernel, descriptor.request.version)
        arguments = check(spec, descriptor)
        size = sum(arguments.lengths)
        if size > self._max_call_bytes:
            raise ResourceExhausted(
                f"the call's tensors are {size} bytes, more than max_call_bytes={self._max_call_bytes}"
            )
        beside = self._arena, self._metrics, self._tracing
        dispatcher = self._dispatcher_of(spec)
        call = Call(lane, descriptor, spec, arguments, *beside, dispatcher.offer)
        dispatcher.admit(call)
        try:
            call.make_room()
        except ResourceExhausted as error:
            raise dispatcher.full(error.message) from error
        return call

    def _spec(self, name: str, version: str) -> KernelSpec:
        spec = self._kernels.get(name)
        if spec is not None and version in ("", spec.version):
            return spec
        raise no_kernel(name, version, {spec.name: spec.version for spec in self._kernels.values()})
