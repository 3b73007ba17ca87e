"""The answer to a RunFrame: outputs written to the reply segment, or an error in a Failed frame."""

import sys
import traceback
from collections.abc import Sequence
from itertools import accumulate
from mmap import mmap
from typing import NamedTuple

import numpy as np

from unlatch.common.errors import Cancelled, Internal, ResourceExhausted, UnlatchError, opaque
from unlatch.common.kernel.spec import KernelSpec
from unlatch.common.kernel.tensors import STRING_KINDS, Array, dtype_name, pack_bytes
from unlatch.compute.ipc.arena import offsets
from unlatch.compute.ipc.frames import FRAME_BYTES, Done, Failed, Member, Result, RunFrame, Tensor, encode


class Packed(NamedTuple):
    """Outputs that are about to be written: each one's form and its offsets, its start, and the size of all."""

    outputs: list[Array]
    contents: list[tuple[Array | bytes, list[int]]]
    starts: list[int]
    rows: list[int]
    size: int


def packed(spec: KernelSpec, outputs: list[Array], members: Sequence[Member], limit_bytes: int) -> Packed:
    """Find where each output will lie in the reply. Raises ResourceExhausted if they are too large."""
    rows = [member.tensors[0].shape[0] for member in members] if len(members) > 1 else []
    contents = [_packed(output, rows) for output in outputs]
    starts, size = offsets([ends[-1] for _, ends in contents])
    if size > limit_bytes:
        raise ResourceExhausted(f"kernel {spec.name} returned {size} bytes, more than max_reply_bytes={limit_bytes}")
    return Packed(outputs, contents, starts, rows, size)


def write(reply: Packed, memory: mmap | bytearray, members: Sequence[Member]) -> tuple[Result, ...]:
    """Write each output once to `memory`, and return where each member's rows of it lie."""
    tensors: list[list[Tensor]] = []
    rows = reply.rows
    for output, (content, ends), start in zip(reply.outputs, reply.contents, reply.starts, strict=True):
        if isinstance(content, bytes):
            memory[start : start + len(content)] = content
        else:
            native = content.dtype.newbyteorder("=")
            np.copyto(np.ndarray(content.shape, native, memory, start), content)
        dtype, shapes = dtype_name(output), [(count, *output.shape[1:]) for count in rows] or [output.shape]
        tensors.append(
            [
                Tensor(dtype, shape, start + before, end - before)
                for shape, before, end in zip(shapes, (0, *ends), ends, strict=False)
            ]
        )
    return tuple(Result(member.call, own) for member, own in zip(members, zip(*tensors, strict=True), strict=True))


def own_copies(reply: Packed) -> Packed:
    """Return the same reply with copies of those outputs that something else can still write to."""
    counted = zip(reply.contents, _references(reply), strict=True)
    return reply._replace(
        contents=[
            (content if isinstance(content, bytes) or _is_own(content, count) else content.copy(), ends)
            for (content, ends), count in counted
        ]
    )


def _references(reply: Packed) -> list[int]:
    """Count the references to each output. Those of the reply itself, and of this function, are among them."""
    return [sys.getrefcount(content) for content, _ in reply.contents]


def _is_own(array: Array, references: int) -> bool:
    """Whether nothing but a reply refers to an array, or its memory is an input's, which no process can write to."""
    if array.base is None:
        return references <= _REFERENCES_OF_A_REPLY
    base: object = array.base
    while isinstance(base, np.ndarray):
        base = base.base
    return not array.flags.writeable and isinstance(base, mmap)


def _unshared() -> Packed:
    """Return a reply with an array that nothing else refers to."""
    array = np.zeros(1)
    return Packed([array], [(array, [array.nbytes])], [0], [], array.nbytes)


_REFERENCES_OF_A_REPLY = _references(_unshared())[0]


def encoded(answer: Done | Failed, run: RunFrame, members: Sequence[Member]) -> bytes:
    """Encode an answer, or an error if the answer does not fit in a frame."""
    frame = encode(answer)
    if len(frame) > FRAME_BYTES and isinstance(answer, Done):
        # Only many calls with many outputs are too much: each call by itself fits.
        error = ResourceExhausted(
            f"kernel {run.kernel} has more outputs than fit in one frame for {len(members)} calls"
        )
        return encode(failed(members[0], error, "", answer.run_nanoseconds))
    return frame


def not_begun(run: RunFrame) -> Failed:
    """The answer to a RunFrame whose calls were all cancelled before it began."""
    return failed(run.members[0], Cancelled(f"kernel {run.kernel} was not begun: all its calls were cancelled"), "", 0)


def failed(member: Member, error: UnlatchError, log: str, nanoseconds: int, cpu_nanoseconds: int = 0) -> Failed:
    """The answer to a RunFrame that failed; `member` is any of its members."""
    return Failed(member.call, error.code, error.message, error.field, log, nanoseconds, cpu_nanoseconds)


def told(kernel: str, raised: BaseException) -> tuple[UnlatchError, str]:
    """Return the error that a caller gets for what a run raised, and the text for the log; empty if there is none."""
    if isinstance(raised, UnlatchError):
        # An Internal error with a cause wraps the kernel's own exception. The kernel's author needs its traceback.
        log = traceback_text(raised) if isinstance(raised, Internal) and raised.__cause__ else ""
        # A traceback refers to frames, which refer to the error: the run's arrays would outlive the run.
        return raised.with_traceback(None), log
    error, identity = opaque(f"kernel {kernel} failed")
    return error, f"{identity} {traceback_text(raised)}"


def traceback_text(error: BaseException) -> str:
    """A traceback, cut to fit in a frame. Its end is kept, which tells most."""
    text = "".join(traceback.format_exception(error))[-FRAME_BYTES // 4 :]
    return text.encode(errors="replace").decode()


def _packed(output: Array, rows: Sequence[int]) -> tuple[Array | bytes, list[int]]:
    """An output in the form to write, and the offsets at which each member's rows end. Without rows there is one."""
    until = list(accumulate(rows))
    if output.dtype.kind not in STRING_KINDS:
        each = output.nbytes // len(output) if rows and len(output) else 0
        return output, [count * each for count in until] or [output.nbytes]
    parts = [pack_bytes(part) for part in np.split(output, until[:-1])] if rows else [pack_bytes(output)]
    return b"".join(parts), list(accumulate(map(len, parts)))
