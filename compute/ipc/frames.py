"""What front and worker say to each other: one msgpack frame a datagram, on a SOCK_SEQPACKET socketpair.

    front ── Learn (with the fd of a segment), Run, Cancel, Forget, Shrink ──> worker
          <─────────────────────── a Loaded for each kernel and Ready, or Misfit ──
          <─────────────────────────────────────────────────── Done, or Failed ──
          <───────────────────── Shrunk: when asked to, or after a MemoryError ──

A Run is one call, or several that one run of the kernel answers. A worker answers Runs in order, each with one frame:
a Done that names every call but those that were cancelled before it began, or a Failed that is for all of them.

The end of the socket is the end of the worker, whoever closes it. Frames are decoded by type and range: a worker that
sends anything else is killed. A frame is bounded by what a datagram may hold, so whoever makes one refuses what would
not fit (`FRAME_BYTES`).
"""

from collections.abc import Iterable
from typing import Annotated

import msgspec

from unlatch.common.kernel.spec import KernelSpec

# How the forkserver is told which kernel modules to load; the front sets it for the forkserver alone.
PRELOAD_VARIABLE = "UNLATCH_PRELOAD"
# Under the kernel's default socket buffer, with two frames on their way at most.
FRAME_BYTES = 64 * 1024
# What a Run's str parameters may take of that together: the rest is names, shapes and numbers.
MOST_STRING_BYTES = FRAME_BYTES // 2
# What the members of a Run may take of that, by `described_bytes`.
MOST_MEMBERS_BYTES = FRAME_BYTES // 4

# What a worker says is not believed: numbers that the front reckons or answers with are what they can be.
Number = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Code = Annotated[int, msgspec.Meta(ge=1, le=16)]

Parameters = dict[str, bool | int | float | str]


class Tensor(msgspec.Struct, array_like=True, frozen=True):
    """One array: where it lies in its segment, and what it is."""

    dtype: str
    shape: tuple[Number, ...]
    offset: Number
    length: Number


class Learn(msgspec.Struct, array_like=True, tag="learn"):
    """A segment that Runs will name; its descriptor comes along. It holds inputs, or is to be written to."""

    segment: int
    writable: bool


class Member(msgspec.Struct, array_like=True, frozen=True):
    """One call of a Run; the segment is -1 where it brings no bytes."""

    call: int
    segment: int
    tensors: tuple[Tensor, ...]


class Run(msgspec.Struct, array_like=True, tag="run"):
    """Run a kernel over tensors in input segments, and write the results to a reply segment.

    Several members have the same dtypes and shapes but for their first axes, along which they become one.
    """

    kernel: str
    parameters: Parameters
    reply_segment: int
    members: tuple[Member, ...]


class Cancel(msgspec.Struct, array_like=True, tag="cancel"):
    """Nobody waits for calls any more: one not begun is not to be, one begun may notice (`unlatch.cancelled`)."""

    calls: list[int]


class Forget(msgspec.Struct, array_like=True, tag="forget"):
    """Segments that are gone."""

    inputs: list[int]
    replies: list[int]


class Shrink(msgspec.Struct, array_like=True, tag="shrink"):
    """Give memory back that is not in use, as soon as no kernel runs, and tell what is left."""


class Loaded(msgspec.Struct, array_like=True, tag="loaded"):
    """A kernel that this worker has."""

    kernel: KernelSpec


class Ready(msgspec.Struct, array_like=True, tag="ready"):
    """The worker takes Runs."""


class Misfit(msgspec.Struct, array_like=True, tag="misfit"):
    """The kernels do not load; the message says which file and line, and why. The worker ends."""

    message: str


class Result(msgspec.Struct, array_like=True, frozen=True):
    """What a call has come to, in the reply segment that its Run named."""

    call: Number
    tensors: tuple[Tensor, ...]


class Done(msgspec.Struct, array_like=True, tag="done"):
    """The results of a Run's calls."""

    results: tuple[Result, ...]
    run_nanoseconds: Number


class Failed(msgspec.Struct, array_like=True, tag="failed"):
    """A Run that ended with an error; `call` is one of its. `log` is the whole story, for the front's log alone."""

    call: int
    code: Code
    message: str
    field: str
    log: str
    run_nanoseconds: Number


class Shrunk(msgspec.Struct, array_like=True, tag="shrunk"):
    """What the worker has left of its own once it has given back what it could: see `limits.Taken`."""

    resident_bytes: Number
    data_bytes: Number
    # Whether it shrank because a run was refused memory.
    ran_short: bool


ToWorker = Learn | Run | Cancel | Forget | Shrink
ToDispatcher = Loaded | Ready | Misfit | Done | Failed | Shrunk

encode = msgspec.msgpack.Encoder().encode
decode_for_worker = msgspec.msgpack.Decoder(ToWorker).decode
decode_for_dispatcher = msgspec.msgpack.Decoder(ToDispatcher).decode


def described_bytes(axes: Iterable[int]) -> int:
    """What a call's tensors of so many axes take of a frame at most, each with its dtype, offset and length."""
    return 16 + sum(40 + 9 * count for count in axes)
