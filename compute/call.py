"""A call as the dispatcher holds it: from its descriptor's arrival until its reply is on its way."""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Protocol

import msgspec

from unlatch.common.errors import UnlatchError
from unlatch.common.kernel.datatypes import NP_DTYPE, carrier, is_carried
from unlatch.common.kernel.spec import KernelSpec
from unlatch.common.lane.body import Arrival, Body, Buffer
from unlatch.common.lane.replies import failed
from unlatch.common.lane.server import ServingEnd
from unlatch.common.telemetry.tracing import Tracing
from unlatch.common.waiting.demand import UNKNOWN, Demand
from unlatch.common.waiting.priority import NORMAL, RANKS
from unlatch.compute.ipc.arena import Block, InputArena, offsets
from unlatch.compute.ipc.frames import Parameters, Tensor
from unlatch.compute.metrics import ComputeMetrics
from unlatch.protos.unlatch_pb2 import Descriptor, Reply


class Ran(msgspec.Struct, frozen=True):
    """The run of a call: its seconds, its worker's slot, and its number of calls.

    `cpu_seconds` is of an async run. Any other uses its worker alone, so its seconds say what it costs.
    """

    seconds: float
    worker: int
    calls: int = 1
    cpu_seconds: float = 0.0


_NOT_RUN = Ran(0.0, 0, 0)


@dataclass(slots=True)
class Arguments:
    """A call's arguments, and its requested outputs.

    `lengths` are the tensors' bytes, in the descriptor's order. `order[i]` is the position there of the kernel's i-th
    array; `outputs` are positions in the spec.
    """

    lengths: list[int]
    dtypes: list[str]
    shapes: list[tuple[int, ...]]
    order: list[int]
    parameters: Parameters
    outputs: Sequence[int]


class Holder(Protocol):
    """The part that holds a call: the check for poison, the dispatcher with its backlog, or a worker's runs."""

    def withdraw(self, call: "Call") -> None:
        """Release a call whose caller has left, as soon as that is safe. Raises nothing."""


class Call:
    """A call. Exactly one of `answer`, `fail` and `abandon` ends it for its caller; `release` frees its memory."""

    def __init__(
        self,
        lane: ServingEnd,
        descriptor: Descriptor,
        spec: KernelSpec,
        arguments: Arguments,
        arena: InputArena,
        metrics: ComputeMetrics,
        tracing: Tracing,
        landed: Callable[["Call"], None],
    ) -> None:
        self.spec = spec
        self.arguments = arguments
        # Set by the dispatcher when the call is admitted.
        self.estimate = UNKNOWN
        self.ended = False
        # None before the call's bytes have arrived, and after the call is settled.
        self.holder: Holder | None = None
        # How many workers exited while they ran the call.
        self.deaths = 0
        # How many workers exited while they ran this call beside others, so that it is unknown which call was the
        # cause; and the company that it runs in since the second time: 0 is the company of all other calls.
        self.deaths_beside = self.company = 0
        # A hash of the call, made when it is needed (compute/dispatch/poison.py).
        self.digest = b""
        remaining = descriptor.remaining_microseconds
        self.arrived = monotonic()
        # When the call's bytes were complete, so that it waits for a worker; and when a worker began it.
        self.landed = self.begun = self.arrived
        self._lane = lane
        self._descriptor = descriptor
        # Whether its caller, a gateway, wants to know when the call begins.
        self._announces_begin = descriptor.attempt > 0
        # Whether the call may begin only after its caller has confirmed that it knows, and so sends it nowhere else.
        self.must_be_known = self._announces_begin and not spec.pure
        self._arena = arena
        self._metrics = metrics
        self._tracing = tracing
        self._when_landed = landed
        self._arrival = Arrival(arguments.lengths)
        self._starts, self.size = offsets(arguments.lengths)
        self.block: Block | None = None
        self.demand = Demand(
            spec.name,
            self.size,
            descriptor.tenant,
            RANKS.get(descriptor.priority, RANKS[NORMAL]),
            self.arrived + remaining / 1e6 if remaining else math.inf,
            _batch(spec, arguments),
        )

    @property
    def rows(self) -> int:
        """The length of the first axis of the arrays, for a kernel whose calls may run as one."""
        return self.arguments.shapes[0][0]

    def make_room(self) -> None:
        """Reserve room in the arena for the call's bytes. Raises ResourceExhausted if there is none."""
        if self.size:
            self.block = self._arena.allocate(self.size)

    def announce(self, heard: Callable[[], None]) -> bool:
        """Tell the caller that the call is about to begin. Returns whether `heard` will be called on confirmation."""
        if self.ended:
            return False

        def known() -> None:
            self.must_be_known = False
            heard()

        self._lane.started(self._descriptor.call, known)
        return True

    def begins(self, now: float) -> None:
        """Note that a worker begins the call. If its kernel is pure, tell a caller that wants to know."""
        self.begun = now
        if self.spec.pure and self._announces_begin:
            self._lane.started(self._descriptor.call)

    @property
    def complete(self) -> bool:
        """Whether all bytes of the call are in the arena."""
        return not self._arrival.missing

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The arrays in the kernel's order, with their places in the input segment."""
        base = self.block.offset if self.block else 0
        arguments = self.arguments
        return tuple(
            Tensor(arguments.dtypes[i], arguments.shapes[i], base + self._starts[i], arguments.lengths[i])
            for i in arguments.order
        )

    def land(self, whole: Sequence[memoryview]) -> None:
        """Write all bytes of the call to the arena at once, and offer the call to the dispatcher."""
        if self.block is not None:
            memory, base = self.block.segment.view, self.block.offset
            for start, piece in zip(self._starts, whole, strict=True):
                memory[base + start : base + start + len(piece)] = piece
        self._arrival.missing = 0
        self._when_landed(self)

    def feed(self, piece: memoryview) -> None:
        """Write the next piece of the call's bytes to the arena. After the last piece, offer it to the dispatcher.

        Raises ProtocolViolation if the piece does not fit.
        """
        tensor, at = self._arrival.place(len(piece))
        if self.block is not None:
            start = self.block.offset + self._starts[tensor] + at
            self.block.segment.view[start : start + len(piece)] = piece
        if self.complete:
            self.landed = monotonic()
            self._when_landed(self)

    def answer(self, tensors: Sequence[Tensor], memory: memoryview, ran: Ran, sent: Callable[[], None]) -> None:
        """Send a kernel's results from `memory`. `sent` is called when `memory` is no longer needed."""
        reply = Reply()
        response = reply.response
        response.kernel, response.version, response.id = self.spec.name, self.spec.version, self._descriptor.request.id
        buffers: list[Buffer] = []
        wanted = [(self.spec.outputs[index], tensors[index]) for index in self.arguments.outputs]
        for declared, tensor in wanted:
            shape = tensor.shape
            described = response.tensors.add(name=declared.name, datatype=carrier(tensor.dtype))
            if is_carried(tensor.dtype):
                described.parameters[NP_DTYPE].string_param = tensor.dtype
                shape = (*shape, 2) if tensor.dtype.startswith("complex") else shape
            described.shape[:] = shape
            buffers.append(memory[tensor.offset : tensor.offset + tensor.length])
        body = Body([len(buffer) for buffer in buffers], buffers)
        if body.whole:
            # Copying a small reply out is cheaper than keeping its segment from the worker until it is sent.
            body.buffers = [bytes(buffer) for buffer in buffers]
            sent()
        self._end(reply, body, "OK", ran, None if body.whole else sent)

    def fail(self, error: UnlatchError, ran: Ran | None = None) -> None:
        """End the call with an error."""
        if self.ended:
            return
        self._end(failed(error), Body((), []), error.status, ran or _NOT_RUN, None)

    def abandon(self) -> None:
        """End the call without a reply, because its caller has left."""
        if self.ended:
            return
        self.ended = True
        if self.holder is not None:
            self.holder.withdraw(self)
        else:
            # The call has no holder before all its bytes have arrived, and no more of them come.
            self.release()
        self._metrics.call_ended(self.spec.name, "CANCELLED")

    def release(self) -> None:
        """Free the call's memory. Call only when no worker can be reading it."""
        if self.block is not None:
            self._arena.free(self.block)
            self.block = None

    def _end(self, reply: Reply, body: Body, code: str, ran: Ran, sent: Callable[[], None] | None) -> None:
        self.ended = True
        now = monotonic()
        queue = max(0.0, self.begun - self.landed)
        timings = reply.timings
        timings.transfer = round((self.landed - self.arrived) * 1e6)
        timings.queue = round(queue * 1e6)
        timings.run = round(ran.seconds * 1e6)
        timings.worker = ran.worker
        timings.batch = ran.calls
        if ran.cpu_seconds:
            timings.cpu = math.ceil(ran.cpu_seconds * 1e6)
        # First, so that the caller has its reply even if the lines below raise.
        self._lane.reply(self._descriptor.call, reply, body, sent)
        self._metrics.call_ended(self.spec.name, code)
        # A worker begins a staged run before its last reply is read here, so the run may be longer than `now - begun`.
        reply_seconds = max(0.0, now - self.begun - ran.seconds)
        self._metrics.stages(self.spec.name, self.landed - self.arrived, queue, ran.seconds, reply_seconds)
        if self._tracing.records:
            self._trace(queue, code, ran)

    def _trace(self, queue: float, code: str, ran: Ran) -> None:
        """Record a span for the call's wait, and one for its run if it ran."""
        attributes: dict[str, str | int] = {"unlatch.kernel": self.spec.name, "unlatch.code": code}
        waited_until = self.landed + queue if ran is not _NOT_RUN else monotonic()
        self._tracing.passed("queue", self._descriptor, self.landed, waited_until, attributes)
        if ran is not _NOT_RUN:
            attributes |= {"unlatch.worker": ran.worker, "unlatch.batch": ran.calls}
            self._tracing.passed("run", self._descriptor, self.begun, self.begun + ran.seconds, attributes)


def _batch(spec: KernelSpec, arguments: Arguments) -> Hashable | None:
    """Return the key that calls share if they may run together: all but the first axes' lengths and the bytes."""
    if not spec.batch:
        return None
    arrays = tuple((arguments.dtypes[i], arguments.shapes[i][1:]) for i in arguments.order)
    return spec.name, arrays, repr(arguments.parameters)
