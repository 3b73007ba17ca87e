"""Frames between dispatcher and worker: one msgpack frame a datagram, on a SOCK_SEQPACKET socketpair.

               <─────────────────────── a Loaded for each kernel and Ready, or Misfit ──
    dispatcher ── Serve, then Learn (with the fd of a segment), RunFrame, Cancel, Forget, Shrink; at last End ──> worker
               <─────────────────────────────────────────────────── Done, or Failed ──
               <───────────────────── Shrunk: when asked to, or after a MemoryError ──

A RunFrame holds one call, or several that one run of the kernel answers. A worker answers RunFrames in order, each with
one frame: a Done that names every call except those cancelled before the run began, or a Failed that holds for all.

An async worker has many runs at once, each of one call, and answers them in any order. It writes a small reply into its
Done frame. For a larger one it asks for a segment once it knows the size:

               <── Wants ──    dispatcher ── Lend ──> worker    <── Done ──

It also sends CancelHeard for each Cancel, Blocks when a coroutine blocks its event loop, and Unblocks when that ends.

When either side closes the socket, the worker's life ends. Frames are decoded by type and range, and a worker that
sends anything else is killed. A datagram bounds the size of a frame, so the sender refuses what would not fit
(`FRAME_BYTES`).
"""

from collections.abc import Iterable
from typing import Annotated

import msgspec

from unlatch.common.kernel.lists import Value
from unlatch.common.kernel.spec import KernelSpec

# The variable that names the kernel modules to load; the dispatcher sets it for the forkserver alone.
PRELOAD_VARIABLE = "UNLATCH_PRELOAD"
# The variable that tells a worker, and OpenBLAS, how many threads a library may use.
THREADS_VARIABLE = "OPENBLAS_NUM_THREADS"
# The kinds of workers: one call at a time, and coroutines on an event loop.
PLAIN, ASYNC = "plain", "async"
# Small enough for Linux's default socket buffer to hold the two frames that may be on their way.
FRAME_BYTES = 64 * 1024
# The part of a RunFrame that its str parameters and lists may take together; the rest is names, shapes and numbers.
MAX_STRING_BYTES = FRAME_BYTES // 2
# The part of a RunFrame that its members may take, by `described_bytes`.
MAX_MEMBERS_BYTES = FRAME_BYTES // 4

# A worker's frames are not trusted: numbers that the dispatcher computes or answers with have a checked range.
Number = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Code = Annotated[int, msgspec.Meta(ge=1, le=16)]

# The longest text of a frame that only a log shows.
MAX_PLACE_CHARACTERS = 512
# The bytes of a reply that an async worker writes into its Done frame.
MAX_INLINE_BYTES = 16 * 1024
# The reply segment of a RunFrame for an async worker, and of a Lend when there is no memory for one.
NO_SEGMENT = -1

Parameters = dict[str, Value | list[Value]]


class Tensor(msgspec.Struct, array_like=True, frozen=True):
    """An array: its dtype and shape, and its place in a segment."""

    dtype: str
    shape: tuple[Number, ...]
    offset: Number
    length: Number


class Learn(msgspec.Struct, array_like=True, tag="learn"):
    """A segment for later RunFrames, sent with its descriptor. It holds inputs, or is writable and for replies."""

    segment: int
    writable: bool


class Member(msgspec.Struct, array_like=True, frozen=True):
    """A call of a RunFrame. The segment is -1 for a call without bytes."""

    call: int
    segment: int
    tensors: tuple[Tensor, ...]


class RunFrame(msgspec.Struct, array_like=True, tag="run"):
    """Run a kernel over tensors in input segments, and write the results to a reply segment.

    Several members have the same dtypes and shapes except for their first axes, along which they are joined. All leave
    out the same arrays: those in these places of the signature, in ascending order.
    """

    kernel: str
    parameters: Parameters
    reply_segment: int
    members: tuple[Member, ...]
    left_out: tuple[int, ...] = ()


class Cancel(msgspec.Struct, array_like=True, tag="cancel"):
    """Calls that are cancelled: the worker does not begin them, and running ones may notice (`unlatch.cancelled`)."""

    calls: list[int]


class Forget(msgspec.Struct, array_like=True, tag="forget"):
    """Segments that the dispatcher has dropped."""

    inputs: list[int]
    replies: list[int]


class Shrink(msgspec.Struct, array_like=True, tag="shrink"):
    """Free unused memory as soon as no kernel runs, and report what is left."""


class Serve(msgspec.Struct, array_like=True, tag="serve"):
    """Serve RunFrames from now on. `memory_bytes` limits the memory that the worker takes meanwhile; 0 is no limit."""

    memory_bytes: int


class Lend(msgspec.Struct, array_like=True, tag="lend"):
    """The reply segment for a call whose worker has asked for one."""

    call: int
    segment: int


class End(msgspec.Struct, array_like=True, tag="end"):
    """Run the teardowns, and end."""


class Loaded(msgspec.Struct, array_like=True, tag="loaded"):
    """A kernel that this worker has loaded."""

    kernel: KernelSpec


class Ready(msgspec.Struct, array_like=True, tag="ready"):
    """The worker is ready for Serve. `teardown` tells whether it has a teardown to run as it ends."""

    teardown: bool = False


class Misfit(msgspec.Struct, array_like=True, tag="misfit"):
    """The kernels could not be loaded; the message has file, line and reason. The worker ends.

    `setup` tells that they were loaded, and that a setup has failed.
    """

    message: str
    setup: bool = False


class Result(msgspec.Struct, array_like=True, frozen=True):
    """The outputs of one call, in the reply segment that its RunFrame named."""

    call: Number
    tensors: tuple[Tensor, ...]


class Done(msgspec.Struct, array_like=True, tag="done"):
    """The results of all calls of a RunFrame. `inline` and `cpu_nanoseconds` are of async workers alone.

    `inline` has the bytes of the results, if they are not in a segment.
    """

    results: tuple[Result, ...]
    run_nanoseconds: Number
    cpu_nanoseconds: Number = 0
    inline: bytes | None = None


class Failed(msgspec.Struct, array_like=True, tag="failed"):
    """A failed run; `call` is one of its calls. `log` is the full traceback, only for the dispatcher's log."""

    call: int
    code: Code
    message: str
    field: str
    log: str
    run_nanoseconds: Number
    cpu_nanoseconds: Number = 0


class Shrunk(msgspec.Struct, array_like=True, tag="shrunk"):
    """The worker's own memory after it freed what it could: see `memory_limits.Taken`."""

    resident_bytes: Number
    data_bytes: Number
    # Whether the worker freed memory because the system had refused memory to a run.
    ran_short: bool


class Wants(msgspec.Struct, array_like=True, tag="wants"):
    """An async worker's reply to a call is too large for a frame, and needs a segment."""

    call: Number


class CancelHeard(msgspec.Struct, array_like=True, tag="cancel_heard"):
    """An async worker has cancelled the tasks of these calls."""

    calls: list[Number]


class Blocks(msgspec.Struct, array_like=True, tag="blocks"):
    """A coroutine of a call blocks the event loop of its worker. `place` is where it stands: file, line, function."""

    call: Number
    place: Annotated[str, msgspec.Meta(max_length=MAX_PLACE_CHARACTERS)]


class Unblocks(msgspec.Struct, array_like=True, tag="unblocks"):
    """The coroutine that Blocks told of has let the event loop go on."""

    call: Number


# What only async workers send.
AsyncFrame = Wants | CancelHeard | Blocks | Unblocks
ToWorker = Serve | Learn | RunFrame | Cancel | Forget | Shrink | Lend | End
ToDispatcher = Loaded | Ready | Misfit | Done | Failed | Shrunk | AsyncFrame

encode = msgspec.msgpack.Encoder().encode
decode_for_worker = msgspec.msgpack.Decoder(ToWorker).decode
decode_for_dispatcher = msgspec.msgpack.Decoder(ToDispatcher).decode


def value_bytes(value: Value) -> int:
    """Maximum bytes of a frame that a value takes."""
    return 5 + len(value.encode()) if isinstance(value, str) else 9


def described_bytes(axes: Iterable[int]) -> int:
    """Maximum bytes of a frame that a call's tensors take, given the number of axes of each."""
    return 16 + sum(40 + 9 * count for count in axes)
