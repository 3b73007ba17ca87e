"""A kernel's call: its input arrays, the function itself, and checks of its outputs.

members' bytes in the arena ──> input_arrays ──> the kernel ──> outputs_of ──> outputs, as the kernel declares them
                                                     └ raises: explanation
"""

from collections.abc import Callable, Sequence
from mmap import mmap
from typing import Any

import numpy as np

from unlatch.common.errors import Internal, KernelError
from unlatch.common.kernel.datatypes import OBJECT, is_served
from unlatch.common.kernel.spec import ANY_LENGTH, ELLIPSIS, ArraySpec, KernelSpec, one_by_one
from unlatch.common.kernel.tensors import Array, dtype_name, view
from unlatch.compute.ipc.arena import ALIGNMENT, Mapped
from unlatch.compute.ipc.frames import Member, Parameters, Tensor

# Classes of arrays whose elements mean what those of np.ndarray mean.
_SENT_AS_THEY_ARE = frozenset({np.ndarray, np.memmap, np.matrix})


def input_arrays(mapped: Mapped, spec: KernelSpec, members: Sequence[Member]) -> list[Array]:
    """The kernel's input arrays: views of one member's bytes, or the joined arrays of several members."""
    sources = [mapped.input(member.segment) if member.segment >= 0 else b"" for member in members]
    columns = zip(*(member.tensors for member in members), strict=True)
    return [
        _joined(array.name, sources, column) if len(column) > 1 else _view(array.name, sources[0], column[0])
        for array, column in zip(spec.inputs, columns, strict=True)
    ]


def call_kernel(
    function: Callable[..., Any], spec: KernelSpec, arrays: list[Array], parameters: Parameters
) -> list[Array]:
    """Call a kernel and check its outputs. Raises Internal for a faulty kernel, or what the kernel raises."""
    try:
        result = function(*arrays, **parameters)
    except (KernelError, TypeError, ValueError) as error:
        fault = explanation(spec, error)
        if fault is None:
            raise
        raise fault from error
    return outputs_of(spec, arrays, result)


def explanation(spec: KernelSpec, error: Exception) -> Internal | None:
    """Return the error to raise in place of what a kernel raised; None if that is as it should be.

    A refusal that names an argument gets its field.
    """
    if isinstance(error, KernelError):
        error.field = error.field or _argument_named(spec, error.message)
    elif "read-only" in str(error):
        return Internal(f"kernel {spec.name} writes to its input; inputs are read-only, so it must copy first")
    elif "readonly array" in str(error):
        return Internal(
            f"kernel {spec.name} is compiled for writable arrays; inputs are read-only, so its types must say so"
        )
    return None


def outputs_of(spec: KernelSpec, arrays: list[Array], result: Any) -> list[Array]:
    """Return what a kernel returned as arrays, checked against its declaration. Raises Internal for a faulty kernel."""
    outputs = list(result) if isinstance(result, tuple) else [result]
    if len(outputs) != len(spec.outputs):
        raise Internal(f"kernel {spec.name} returned {len(outputs)} results, but declares {len(spec.outputs)}")
    lengths = _named_lengths(spec, arrays)
    return [_checked(spec, array, output, lengths) for array, output in zip(spec.outputs, outputs, strict=True)]


def _argument_named(spec: KernelSpec, message: str) -> str:
    """Return the argument that a kernel's refusal begins with, as in `x: wanted …`; "" if it names none."""
    name, colon, _ = message.partition(":")
    declared = {array.name for array in spec.inputs} | {scalar.name for scalar in spec.scalars}
    return name if colon and name in declared else ""


def _view(name: str, memory: mmap | bytes, tensor: Tensor) -> Array:
    return view(name, memory, tensor.dtype, tensor.shape, tensor.offset, tensor.length)


def _joined(name: str, sources: Sequence[mmap | bytes], tensors: Sequence[Tensor]) -> Array:
    """Join tensors along their first axis. Like a single tensor's, the array is aligned and read-only."""
    first = tensors[0]
    if first.dtype == OBJECT:
        array = np.concatenate([_view(name, source, tensor) for source, tensor in zip(sources, tensors, strict=True)])
    else:
        # The joined array's bytes are the tensors' bytes in a row, so no array is made of each tensor.
        room = np.empty(sum(tensor.length for tensor in tensors) + ALIGNMENT, np.uint8)
        memory, start = room.data, -room.ctypes.data % ALIGNMENT
        at = start
        for source, tensor in zip(sources, tensors, strict=True):
            memory[at : (at := at + tensor.length)] = memoryview(source)[tensor.offset : tensor.offset + tensor.length]
        shape = (sum(tensor.shape[0] for tensor in tensors), *first.shape[1:])
        array = np.ndarray(shape, first.dtype, room, start)
    array.flags.writeable = False
    return array


def _named_lengths(spec: KernelSpec, arrays: list[Array]) -> dict[str, int | tuple[int, ...]]:
    """The length of each named axis in this call. The dispatcher has checked that the arrays agree."""
    lengths: dict[str, int | tuple[int, ...]] = {}
    for declared, array in zip(spec.inputs, arrays, strict=True):
        dims, sizes, many, several = one_by_one(declared.dims, array.shape)
        lengths.update(zip(dims, sizes, strict=True))
        lengths[many] = tuple(several)
    for anonymous in (ANY_LENGTH, ELLIPSIS, ""):
        lengths.pop(anonymous, None)
    return lengths


def _checked(spec: KernelSpec, declared: ArraySpec, output: Any, lengths: dict[str, int | tuple[int, ...]]) -> Array:
    """Check an output against its declaration. Raises Internal, since the kernel is at fault and not the caller."""
    if type(output) not in _SENT_AS_THEY_ARE:
        _check_kind(output, f"kernel {spec.name} returned a {type(output).__name__} for {declared.name}")
    array = np.asarray(output)
    if not is_served(dtype_name(array)):
        raise Internal(f"kernel {spec.name} returned {array.dtype} for {declared.name}, which no datatype carries")
    if declared.dtypes and dtype_name(array) not in declared.dtypes:
        raise Internal(
            f"kernel {spec.name} returned {array.dtype} for {declared.name}, "
            f"but declares {' or '.join(declared.dtypes)}"
        )
    if not _has_declared_shape(declared, array.shape, lengths):
        raise Internal(
            f"kernel {spec.name} returned shape {array.shape} for {declared.name}, "
            f"but declares ({', '.join(declared.dims)})"
        )
    return array


def _check_kind(output: Any, returned: str) -> None:
    """Refuse what is not an array, or an array whose class gives its elements another meaning."""
    if isinstance(output, np.generic):
        return
    if not isinstance(output, np.ndarray):
        raise Internal(f"{returned}, not an array")
    if not hasattr(output, "mask"):
        raise Internal(f"{returned}, not a plain array; return np.asarray(…) if the elements alone are the result")
    if np.any(output.mask):
        raise Internal(f"{returned} with masked elements, which cannot be sent; return filled(…) or compressed()")


def _has_declared_shape(declared: ArraySpec, shape: tuple[int, ...], lengths: dict[str, int | tuple[int, ...]]) -> bool:
    dims, sizes, many, several = one_by_one(declared.dims, shape)
    if len(dims) != len(sizes) or lengths.get(many, tuple(several)) != tuple(several):
        return False
    return all(
        size == (int(dim) if dim.isdecimal() else lengths.get(dim, size)) for dim, size in zip(dims, sizes, strict=True)
    )
