"""Frames between dispatcher and forkserver: one msgpack frame a datagram, on a SOCK_SEQPACKET socketpair.

    dispatcher <─────────────── versions, in JSON (worker/versions.py): msgspec may be missing ── forkserver
               <──────────────────────────────────────────────── Imported, or its end ──
               ── Fork (with the worker's channel, and the reading end of a pipe) ──>
               <──────────────────────────── Forked (with the worker's pidfd), or NotForked ──
               <───────────────────────────────────────── Reaped, when a worker has ended ──

A Fork is answered once the kernels are loaded. The pipe breaks when the dispatcher ends. When either side closes the
socket, the forkserver's life ends; workers live on while the dispatcher does.
"""

import msgspec

# A Fork has some plain values, and an error or a module's name is short.
FORK_FRAME_BYTES = 16 * 1024


class Fork(msgspec.Struct, array_like=True, tag="fork", frozen=True):
    """Fork a worker of a kind (`frames.PLAIN`, …)."""

    number: int
    kind: str
    max_reply_bytes: int


class Imported(msgspec.Struct, array_like=True, tag="imported", frozen=True):
    """The modules of all kernels have been imported, or have failed to: then each worker sends a Misfit.

    `locked_by` names the modules that have turned the interpreter lock on, in a Python that was built without it.
    """

    locked_by: tuple[str, ...]


class Forked(msgspec.Struct, array_like=True, tag="forked", frozen=True):
    """The worker of a Fork."""

    number: int
    pid: int


class NotForked(msgspec.Struct, array_like=True, tag="not_forked", frozen=True):
    """The system has refused the fork of a worker."""

    number: int
    why: str


class Reaped(msgspec.Struct, array_like=True, tag="reaped", frozen=True):
    """A worker has ended, with an exit code, or by a signal: then the code is negative. Its pid is free."""

    pid: int
    code: int


encode = msgspec.msgpack.Encoder().encode
decode_fork = msgspec.msgpack.Decoder(Fork).decode
decode_for_dispatcher = msgspec.msgpack.Decoder(Imported | Forked | NotForked | Reaped).decode
