"""Frames between dispatcher and worker: one msgpack frame a datagram, on a SOCK_SEQPACKET socketpair.

    dispatcher ── Learn (with the fd of a segment), RunFrame, Cancel, Forget, Shrink ──> worker
               <─────────────────────── a Loaded for each kernel and Ready, or Misfit ──
               <─────────────────────────────────────────────────── Done, or Failed ──
               <───────────────────── Shrunk: when asked to, or after a MemoryError ──

A RunFrame holds one call, or several that one run of the kernel answers. A worker answers RunFrames in order, each with
one frame: a Done that names every call except those cancelled before the run began, or a Failed that holds for all.

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
# Small enough for Linux's default socket buffer to hold the two frames that may be on their way.
FRAME_BYTES = 64 * 1024
# The part of a RunFrame that its str parameters and lists may take together; the rest is names, shapes and numbers.
MAX_STRING_BYTES = FRAME_BYTES // 2
# The part of a RunFrame that its members may take, by `described_bytes`.
MAX_MEMBERS_BYTES = FRAME_BYTES // 4

# A worker's frames are not trusted: numbers that the dispatcher computes or answers with have a checked range.
Number = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Code = Annotated[int, msgspec.Meta(ge=1, le=16)]

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


class Loaded(msgspec.Struct, array_like=True, tag="loaded"):
    """A kernel that this worker has loaded."""

    kernel: KernelSpec


class Ready(msgspec.Struct, array_like=True, tag="ready"):
    """The worker is ready for RunFrames."""


class Misfit(msgspec.Struct, array_like=True, tag="misfit"):
    """The kernels could not be loaded; the message has file, line and reason. The worker ends."""

    message: str


class Result(msgspec.Struct, array_like=True, frozen=True):
    """The outputs of one call, in the reply segment that its RunFrame named."""

    call: Number
    tensors: tuple[Tensor, ...]


class Done(msgspec.Struct, array_like=True, tag="done"):
    """The results of all calls of a RunFrame."""

    results: tuple[Result, ...]
    run_nanoseconds: Number


class Failed(msgspec.Struct, array_like=True, tag="failed"):
    """A failed run; `call` is one of its calls. `log` is the full traceback, only for the dispatcher's log."""

    call: int
    code: Code
    message: str
    field: str
    log: str
    run_nanoseconds: Number


class Shrunk(msgspec.Struct, array_like=True, tag="shrunk"):
    """The worker's own memory after it freed what it could: see `memory_limits.Taken`."""

    resident_bytes: Number
    data_bytes: Number
    # Whether the worker freed memory because the system had refused memory to a run.
    ran_short: bool


ToWorker = Learn | RunFrame | Cancel | Forget | Shrink
ToDispatcher = Loaded | Ready | Misfit | Done | Failed | Shrunk

encode = msgspec.msgpack.Encoder().encode
decode_for_worker = msgspec.msgpack.Decoder(ToWorker).decode
decode_for_dispatcher = msgspec.msgpack.Decoder(ToDispatcher).decode


def value_bytes(value: Value) -> int:
    """Maximum bytes of a frame that a value takes."""
    return 5 + len(value.encode()) if isinstance(value, str) else 9


def described_bytes(axes: Iterable[int]) -> int:
    """Maximum bytes of a frame that a call's tensors take, given the number of axes of each."""
    return 16 + sum(40 + 9 * count for count in axes)
