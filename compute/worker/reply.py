"""The answer to a RunFrame: outputs written to the reply segment, or an error in a Failed frame."""

import traceback
from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from unlatch.common.errors import Cancelled, ResourceExhausted, UnlatchError
from unlatch.common.kernel.spec import KernelSpec
from unlatch.common.kernel.tensors import STRING_KINDS, Array, dtype_name, pack_bytes
from unlatch.compute.ipc.arena import Mapped, offsets
from unlatch.compute.ipc.frames import FRAME_BYTES, Done, Failed, Member, Result, RunFrame, Tensor, encode


def write_outputs(
    mapped: Mapped, spec: KernelSpec, outputs: list[Array], segment: int, members: Sequence[Member], limit_bytes: int
) -> tuple[Result, ...]:
    """Write each output once, and return where each member's rows of it lie. Raises ResourceExhausted."""
    rows = [member.tensors[0].shape[0] for member in members] if len(members) > 1 else []
    packed = [_packed(output, rows) for output in outputs]
    starts, size = offsets([ends[-1] for _, ends in packed])
    if size > limit_bytes:
        raise ResourceExhausted(f"kernel {spec.name} returned {size} bytes, more than max_reply_bytes={limit_bytes}")
    memory = mapped.reply(segment, size)
    tensors: list[list[Tensor]] = []
    for output, (content, ends), start in zip(outputs, packed, starts, strict=True):
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


def failed(member: Member, error: UnlatchError, log: str, nanoseconds: int) -> Failed:
    """The answer to a RunFrame that failed; `member` is any of its members."""
    return Failed(member.call, error.code, error.message, error.field, log, nanoseconds)


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
