"""What front and worker say to each other: one msgpack frame a datagram, on a SOCK_SEQPACKET socketpair.

    front ── Run (with descriptors of segments the worker has not seen) ──> worker
          ── Forget ─────────────────────────────────────────────────────>
          <────────────────── a Loaded for each kernel and Ready, or Misfit ──
          <───────────────────────────────────────────── Done, or Failed ──

A worker answers Runs in order. The end of the socket is the end of the worker, whoever closes it. Frames are decoded by
type and range: a worker that sends anything else is killed. A frame is bounded by what a datagram may hold, so whoever
makes one refuses what would not fit (`FRAME_BYTES`).
"""

from typing import Annotated

import msgspec

from common.spec import KernelSpec

# How the forkserver is told which kernel modules to load; the front sets it for the forkserver alone.
PRELOAD_VARIABLE = "UNLATCH_PRELOAD"
# Under the kernel's default socket buffer, with two frames on their way at most.
FRAME_BYTES = 64 * 1024
# What a Run's str parameters may take of that together: the rest is names, shapes and numbers.
MOST_STRING_BYTES = FRAME_BYTES // 2
# Descriptors that may come along with one Run: an input segment and a reply segment.
MOST_DESCRIPTORS = 2

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


class Run(msgspec.Struct, array_like=True, tag="run"):
    """Run a kernel over tensors in an input segment, and write the result to a reply segment."""

    call: int
    kernel: str
    tensors: tuple[Tensor, ...]
    parameters: Parameters
    input_segment: int
    reply_segment: int
    input_is_new: bool
    reply_is_new: bool


class Forget(msgspec.Struct, array_like=True, tag="forget"):
    """Segments that are gone."""

    inputs: list[int]
    replies: list[int]


class Loaded(msgspec.Struct, array_like=True, tag="loaded"):
    """A kernel that this worker has."""

    kernel: KernelSpec


class Ready(msgspec.Struct, array_like=True, tag="ready"):
    """The worker takes Runs."""


class Misfit(msgspec.Struct, array_like=True, tag="misfit"):
    """The kernels do not load; the message says which file and line, and why. The worker ends."""

    message: str


class Done(msgspec.Struct, array_like=True, tag="done"):
    """A call's result, in the reply segment that its Run named."""

    call: int
    tensors: tuple[Tensor, ...]
    run_nanoseconds: Number


class Failed(msgspec.Struct, array_like=True, tag="failed"):
    """A call that ended with an error. `log` is the whole story, for the front's log alone."""

    call: int
    code: Code
    message: str
    field: str
    log: str
    run_nanoseconds: Number


encode = msgspec.msgpack.Encoder().encode
decode_for_worker = msgspec.msgpack.Decoder(Run | Forget).decode
decode_for_front = msgspec.msgpack.Decoder(Loaded | Ready | Misfit | Done | Failed).decode
