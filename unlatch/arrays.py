"""Arrays on the caller's side: arguments become a descriptor and a body, replies become arrays."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from unlatch.common.errors import InvalidArgument, near
from unlatch.common.kernel.datatypes import DATATYPES, NP_DTYPE, OBJECT, carrier, is_carried, is_served
from unlatch.common.kernel.parameters import parameter
from unlatch.common.kernel.spec import ArraySpec, KernelSpec
from unlatch.common.kernel.tensors import Array, dtype_name, pack_bytes, unpack_bytes
from unlatch.common.lane.body import WHOLE_BYTES, Arrival, Body, Buffer
from unlatch.protos.unlatch_pb2 import Descriptor, Reply, Tensor

_DTYPES = {datatype: np.dtype(dtype) for datatype, (dtype, _) in DATATYPES.items()}

# A lane's pieces are smaller, so each is copied in one step.
_COPIED_AT_ONCE = 1024 * 1024


class RequestBuilder:
    """Builds descriptors of one kernel's calls, and uses the last one again while dtypes and shapes are the same."""

    def __init__(self, spec: KernelSpec, named: Mapping[str, Any]) -> None:
        self.spec = spec
        arrays = {array.name for array in spec.inputs}
        self._named = {name: value for name, value in named.items() if name in arrays}
        self._descriptor = Descriptor()
        request = self._descriptor.request
        # No version is set, so that during a rollout any version that takes these arguments may answer.
        request.kernel = spec.name
        for name, value in named.items():
            if name not in arrays:
                request.parameters[name].CopyFrom(_parameter(spec, name, value))
        self._kind: list[tuple[np.dtype[Any], tuple[int, ...]]] = []

    def request(self, arrays: Sequence[Any]) -> tuple[Descriptor, Body]:
        """Build a call's descriptor, valid until the next one is built, and its body. Raises InvalidArgument."""
        given = [_array(spec, value) for spec, value in self._given(arrays)]
        kind = [(array.dtype, array.shape) for array in given]
        if kind != self._kind:
            self._describe(given)
            self._kind = kind
        buffers = [_buffer(array) for array in given]
        return self._descriptor, Body([len(buffer) for buffer in buffers], buffers)

    def _given(self, arrays: Sequence[Any]) -> list[tuple[ArraySpec, Any]]:
        inputs = self.spec.inputs
        if not self._named and len(arrays) == len(inputs):
            return list(zip(inputs, arrays, strict=True))
        if len(arrays) > len(inputs):
            raise InvalidArgument(f"kernel {self.spec.name} takes {len(inputs)} arrays, but got {len(arrays)}")
        by_position = dict(zip((array.name for array in inputs), arrays, strict=False))
        twice = by_position.keys() & self._named.keys()
        if twice:
            name = min(twice)
            raise InvalidArgument(f"{name}: given by position and by name", field=name)
        every = by_position | self._named
        for array in inputs:
            if array.name not in every:
                raise InvalidArgument(f"{array.name}: kernel {self.spec.name} requires this array", field=array.name)
        return [(array, every[array.name]) for array in inputs]

    def _describe(self, arrays: list[Array]) -> None:
        tensors = self._descriptor.request.tensors
        del tensors[:]
        for spec, array in zip(self.spec.inputs, arrays, strict=True):
            dtype = dtype_name(array)
            if not is_served(dtype):
                raise InvalidArgument(f"{spec.name}: dtype {array.dtype} cannot be sent", field=spec.name)
            tensor = tensors.add(name=spec.name, datatype=carrier(dtype), shape=array.shape)
            if is_carried(dtype):
                tensor.parameters[NP_DTYPE].string_param = dtype
                if array.dtype.kind == "c":
                    tensor.shape.append(2)


class ArrivingArrays:
    """A reply's arrays while its pieces arrive: each piece is copied straight to its place."""

    def __init__(self, reply: Reply, body: Body) -> None:
        self._reply = reply
        self._arrival = Arrival(body.lengths)
        # Not zeroed, as a bytearray would be: zeroing 64 MiB alone stalls a loop for tens of milliseconds.
        self._memory = [np.empty(length, np.uint8).data for length in body.lengths]
        self._cursor = body.subscribe(self._copy)
        # A piece that has been copied is not kept.
        body.let_go()

    def _copy(self) -> None:
        while (piece := self._cursor.next(_COPIED_AT_ONCE)) is not None:
            tensor, at = self._arrival.place(len(piece))
            self._memory[tensor][at : at + len(piece)] = piece

    def arrays(self) -> list[Array]:
        """Return the arrays of a complete reply."""
        return arrays(self._reply.response.tensors, self._memory)

    def close(self) -> None:
        """Free the memory: body, cursor and this object form a cycle, which the garbage collector would free late."""
        self._cursor.close()
        self._memory = []


def arrays(tensors: Sequence[Tensor], memory: Sequence[bytearray | memoryview]) -> list[Array]:
    """Make writable arrays over a reply's bytes."""
    return [_result(tensor, bytes_) for tensor, bytes_ in zip(tensors, memory, strict=True)]


def _array(spec: ArraySpec, value: Any) -> Array:
    """Convert an argument to an array in C order and native byte order; lists and numbers take the kernel's dtype."""
    try:
        if isinstance(value, np.ndarray | np.generic):
            array = np.asarray(value, order="C")
        else:
            preferred = spec.dtypes[0] if spec.dtypes and spec.dtypes[0] != OBJECT else None
            array = np.asarray(value, dtype=preferred, order="C")
    except (ValueError, TypeError) as error:
        raise InvalidArgument(f"{spec.name}: {error}", field=spec.name) from None
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def _buffer(array: Array) -> Buffer:
    if array.dtype.kind in "OSU":
        return pack_bytes(array)
    if array.nbytes <= WHOLE_BYTES:
        return array.tobytes()
    return array.reshape(-1).view(np.uint8).data


def _result(tensor: Tensor, memory: bytearray | memoryview) -> Array:
    shape = tuple(tensor.shape)
    if tensor.datatype == "BYTES":
        return unpack_bytes(tensor.name, memoryview(memory), shape)
    dtype = _DTYPES[tensor.datatype]
    if tensor.parameters:
        dtype = np.dtype(tensor.parameters[NP_DTYPE].string_param)
        shape = shape[:-1] if dtype.kind == "c" else shape
    return np.ndarray(shape, dtype, memory)


def _parameter(spec: KernelSpec, name: str, value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    try:
        return parameter(value)
    except (TypeError, OverflowError) as error:
        known = near(name, [array.name for array in spec.inputs] + [scalar.name for scalar in spec.scalars])
        raise InvalidArgument(f"{name}: {error}{known}", field=name) from None
