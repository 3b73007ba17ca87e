"""Arrays on the caller's side: arguments become a descriptor and a body, replies become arrays.

A call takes the bytes of its arrays when it begins. Its caller may change them at once, whatever their size.
"""

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from copy import deepcopy
from enum import Enum
from typing import Any
from weakref import WeakValueDictionary

import numpy as np

from unlatch.common.errors import InvalidArgument, near, shown
from unlatch.common.kernel.datatypes import DATATYPES, NP_DTYPE, carrier, is_carried, is_served
from unlatch.common.kernel.lists import to_json
from unlatch.common.kernel.parameters import parameter
from unlatch.common.kernel.spec import ArraySpec, KernelSpec
from unlatch.common.kernel.tensors import STRING_KINDS, Array, dtype_name, pack_bytes, unpack_bytes
from unlatch.common.lane.body import WHOLE_BYTES, Arrival, Body, Buffer
from unlatch.conversion import refusal, to_array
from unlatch.protos.unlatch_pb2 import Descriptor, Reply, Tensor

Arguments = Sequence[Any]

_DTYPES = {datatype: np.dtype(dtype) for datatype, (dtype, _) in DATATYPES.items()}

# A lane's pieces are smaller, so each is copied in one step.
_COPIED_AT_ONCE = 1024 * 1024


class Copies:
    """Copies of arguments, for calls that cannot begin at once. Calls of the same unchanged array share one copy."""

    def __init__(self) -> None:
        self._copies: WeakValueDictionary[int, Array] = WeakValueDictionary()

    def of(self, value: Any) -> Any:
        """Copy an argument, or the arguments in a tuple."""
        if isinstance(value, tuple):
            return tuple(map(self.of, value))
        if type(value) is np.ndarray and value.flags.c_contiguous and not value.dtype.hasobject:
            return self.of_array(value)
        try:
            return deepcopy(value)
        except TypeError:
            return np.array(value)

    def of_array(self, array: Array) -> Array:
        """Copy an array in C order without objects."""
        copy = self._copies.get(id(array))
        if copy is None or not _is_same(copy, array):
            copy = self._copies[id(array)] = array.copy()
        return copy


class RequestBuilder:
    """Builds descriptors of one kernel's calls, and uses the last one again while dtypes and shapes are the same.

    `copy` makes a copy of a large array, so that the caller may change the array while the copy is sent.
    """

    def __init__(self, spec: KernelSpec, named: Mapping[str, Any], copy: Callable[[Array], Array] = np.copy) -> None:
        self.spec = spec
        self._copy = copy
        arrays = {array.name: array for array in spec.inputs}
        self._named = {
            name: self._taken(arrays[name], value)
            for name, value in named.items()
            if name in arrays and not _is_left_out(arrays[name], value)
        }
        self._descriptor = Descriptor()
        request = self._descriptor.request
        # No version is set, so that during a rollout any version that takes these arguments may answer.
        request.kernel = spec.name
        for name, value in named.items():
            if name not in arrays:
                _set(request.parameters, spec, name, value)
        self._kind: list[tuple[np.dtype[Any], tuple[int, ...]]] = []
        self._inputs: Sequence[ArraySpec] = ()

    def request(self, arrays: Arguments) -> tuple[Descriptor, Body]:
        """Build a call's descriptor, valid until the next one is built, and its body. Raises InvalidArgument."""
        given, inputs = self._given(arrays)
        kind = [(array.dtype, array.shape) for array, _ in given]
        # Which arrays are left out is part of the kind: those that are given may have the same shapes.
        if kind != self._kind or inputs != self._inputs:
            self._kind, self._inputs = [], ()
            self._describe([array for array, _ in given], inputs)
            self._kind, self._inputs = kind, inputs
        buffers = [buffer for _, buffer in given]
        return self._descriptor, Body([len(buffer) for buffer in buffers], buffers)

    def _given(self, arrays: Arguments) -> tuple[list[tuple[Array, Buffer]], Sequence[ArraySpec]]:
        """Every array with its bytes, by position or by name, in the kernel's order; and the inputs that they are for.

        Raises InvalidArgument.
        """
        inputs = self.spec.inputs
        # Optional arrays come last.
        if inputs and inputs[-1].optional:
            return self._some_given(arrays)
        if len(arrays) > len(inputs):
            raise self._too_many(len(arrays))
        given = [self._taken(spec, value) for spec, value in zip(inputs, arrays, strict=False)]
        if not self._named and len(given) == len(inputs):
            return given, inputs
        self._check_names(inputs, len(given))
        return [*given, *(self._named[array.name] for array in inputs[len(given) :])], inputs

    def _some_given(self, arrays: Arguments) -> tuple[list[tuple[Array, Buffer]], Sequence[ArraySpec]]:
        """Do the same for a kernel with optional arrays: those that are None, or not given, are left out."""
        inputs = self.spec.inputs
        if len(arrays) > len(inputs):
            raise self._too_many(len(arrays))
        self._check_names(inputs, len(arrays))
        given: list[tuple[Array, Buffer]] = []
        present: list[ArraySpec] = []
        for place, spec in enumerate(inputs):
            if place >= len(arrays):
                taken = self._named.get(spec.name)
            else:
                taken = None if _is_left_out(spec, arrays[place]) else self._taken(spec, arrays[place])
            if taken is not None:
                given.append(taken)
                present.append(spec)
        return given, present

    def _check_names(self, inputs: Sequence[ArraySpec], by_position: int) -> None:
        """Check that each array is given once, by position or by name. Raises InvalidArgument."""
        for array in inputs[:by_position]:
            if array.name in self._named:
                raise refusal(array, "given by position and by name")
        for array in inputs[by_position:]:
            if array.name not in self._named and not array.optional:
                raise refusal(array, f"kernel {self.spec.name} requires this array")

    def _too_many(self, given: int) -> InvalidArgument:
        """The error for more arrays than the kernel takes: some of them may be scalars."""
        wanted = len(self.spec.inputs)
        by_name = ", ".join(f"{scalar.name}=…" for scalar in self.spec.scalars)
        hint = f"; give scalars by name: {by_name}" if by_name else ""
        takes = f"{wanted} array{'' if wanted == 1 else 's'}"
        return InvalidArgument(f"kernel {self.spec.name} takes {takes}, but got {given}{hint}")

    def _taken(self, spec: ArraySpec, value: Any) -> tuple[Array, Buffer]:
        """Convert an array, and take its bytes."""
        array = to_array(spec, value)
        if array.dtype.kind in STRING_KINDS:
            try:
                return array, pack_bytes(array)
            except (TypeError, ValueError) as error:
                raise refusal(spec, str(error)) from None
        if array.nbytes <= WHOLE_BYTES:
            return array, array.tobytes()
        return array, self._copy(array).reshape(-1).view(np.uint8).data

    def _describe(self, arrays: list[Array], inputs: Sequence[ArraySpec]) -> None:
        tensors = self._descriptor.request.tensors
        del tensors[:]
        for spec, array in zip(inputs, arrays, strict=True):
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

    def __init__(self, reply: Reply, body: Body, outputs: Sequence[ArraySpec]) -> None:
        self._reply = reply
        self._outputs = outputs
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
        return arrays(self._reply.response.tensors, self._memory, self._outputs)

    def close(self) -> None:
        """Free the memory: body, cursor and this object form a cycle, which the garbage collector would free late."""
        self._cursor.close()
        self._memory = []


def arrays(
    tensors: Sequence[Tensor], memory: Sequence[bytearray | memoryview], outputs: Sequence[ArraySpec]
) -> list[Array]:
    """Make writable arrays over a reply's bytes."""
    return [_result(tensor, bytes_, outputs) for tensor, bytes_ in zip(tensors, memory, strict=True)]


def _is_same(copy: Array, array: Array) -> bool:
    """Whether two arrays in C order are the same, bit by bit."""
    alike = copy.dtype == array.dtype and copy.shape == array.shape
    return alike and np.array_equal(_bits(copy), _bits(array))


def _bits(array: Array) -> Array:
    """View the bytes of an array in C order, eight at a time if that is possible: they are compared faster so."""
    flat = array.reshape(-1).view(np.uint8)
    return flat if flat.size % 8 else flat.view(np.uint64)


def _result(tensor: Tensor, memory: bytearray | memoryview, outputs: Sequence[ArraySpec]) -> Array:
    shape = tuple(tensor.shape)
    if tensor.datatype == "BYTES":
        text = any(output.text and output.name == tensor.name for output in outputs)
        return unpack_bytes(tensor.name, memoryview(memory), shape, text=text)
    dtype = _DTYPES[tensor.datatype]
    if tensor.parameters:
        dtype = np.dtype(tensor.parameters[NP_DTYPE].string_param)
        shape = shape[:-1] if dtype.kind == "c" else shape
    return np.ndarray(shape, dtype, memory)


def _is_left_out(spec: ArraySpec, value: Any) -> bool:
    return value is None and spec.optional


def _set(parameters: MutableMapping[str, Any], spec: KernelSpec, name: str, value: Any) -> None:
    """Add a scalar or a list to the parameters. Raises InvalidArgument."""
    if isinstance(value, np.generic):
        value = value.item()
    try:
        if type(value) is not float and type(value) is not int:
            value = _as_declared(spec, name, value)
        parameters[name].CopyFrom(parameter(value))
    except (TypeError, ValueError, OverflowError) as error:
        known = [array.name for array in spec.inputs] + [scalar.name for scalar in spec.scalars]
        similar = "" if name in known else near(name, known)
        raise InvalidArgument(f"{name}: {error}{similar}", field=name) from None


def _as_declared(spec: KernelSpec, name: str, value: Any) -> Any:
    """A list in JSON, as a parameter carries it, and members of an enum as their values where there are choices."""
    declared = next((scalar for scalar in spec.scalars if scalar.name == name), None)
    if declared is None:
        return value
    is_choice = bool(declared.choices)
    if not declared.many:
        return _plain(value, is_choice=is_choice)
    if isinstance(value, str | bytes) or not isinstance(value, Sequence | np.ndarray):
        raise TypeError(f"wanted a list, got the {type(value).__name__} {shown(value)}")
    return to_json(_plain(one, is_choice=is_choice) for one in value)


def _plain(value: Any, *, is_choice: bool) -> Any:
    """NumPy's scalars as Python's, a member of an enum as its value if it is a choice, and anything else as it is."""
    if is_choice and isinstance(value, Enum):
        value = value.value
    return value.item() if isinstance(value, np.generic) else value
