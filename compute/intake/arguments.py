"""Validation of a call's arguments against its kernel's signature, before the call waits for anything.

The dispatcher knows dtypes by name and axes by length. What only NumPy can see (the prefixes within BYTES), a worker
checks. Every error is an InvalidArgument that names the argument, what was wanted and what was given.
"""

from collections.abc import Collection, Mapping, Sequence

from unlatch.common.errors import InvalidArgument, near, shown
from unlatch.common.kernel.datatypes import NP_DTYPE, seen_by_numpy
from unlatch.common.kernel.lists import Value
from unlatch.common.kernel.parameters import scalar
from unlatch.common.kernel.spec import ANY_LENGTH, ELLIPSIS, ArraySpec, KernelSpec, ScalarSpec, one_by_one
from unlatch.compute.call import Arguments
from unlatch.compute.ipc.frames import MAX_STRING_BYTES, Parameters, value_bytes
from unlatch.protos.unlatch_pb2 import Descriptor, Parameter, RequestedOutput

# A parameter of the protocol's HTTP extension; here every output is binary.
_BINARY_DATA = "binary_data"


def check(spec: KernelSpec, descriptor: Descriptor) -> Arguments:
    """Convert a descriptor to the kernel's arguments. Raises InvalidArgument."""
    tensors = descriptor.request.tensors
    lengths = descriptor.lengths[:]
    if len(lengths) != len(tensors):
        raise _wrong("raw_input_contents", f"wanted {len(tensors)} entries, one for each input, got {len(lengths)}")
    position: dict[str, int] = {}
    dtypes: list[str] = []
    shapes: list[tuple[int, ...]] = []
    for index, tensor in enumerate(tensors):
        name = tensor.name
        if name in position:
            raise _wrong(name, "the array is given twice")
        position[name] = index
        np_dtype = _np_dtype(name[:64], tensor.parameters) if tensor.parameters else ""
        dtype, shape = seen_by_numpy(name[:64], tensor.datatype, tuple(tensor.shape[:]), np_dtype, lengths[index])
        dtypes.append(dtype)
        shapes.append(shape)
    inputs = spec.inputs
    left_out: tuple[int, ...] = ()
    if len(position) != len(inputs) or any(array.name not in position for array in inputs):
        left_out = _left_out(spec, position, descriptor)
        inputs = _others(spec, left_out)
    order: list[int] = []
    axes: dict[str, tuple[int, str]] = {}
    for declared in inputs:
        found = position[declared.name]
        _check_array(declared, dtypes[found], shapes[found], axes)
        if spec.nonempty and 0 in shapes[found]:
            raise InvalidArgument(
                f"{declared.name}: wanted at least one element, got shape {list(shapes[found])}", field=declared.name
            )
        order.append(found)
    scalars = _scalars(spec, descriptor.request.parameters)
    return Arguments(lengths, dtypes, shapes, order, scalars, _outputs(spec, descriptor.request.outputs), left_out)


def _wrong(field: str, text: str) -> InvalidArgument:
    return InvalidArgument(f"{field or 'an empty name'}: {text}", field=field)


def _np_dtype(field: str, parameters: Mapping[str, Parameter]) -> str:
    """The tensor's `np_dtype` parameter, or "". Raises InvalidArgument for bytes in another shared memory."""
    for name in parameters:
        if name.startswith("shared_memory"):
            raise _wrong(field, "shared memory is not served; send the bytes in raw_input_contents")
    if NP_DTYPE not in parameters:
        return ""
    np_dtype = scalar(parameters[NP_DTYPE])
    if not isinstance(np_dtype, str):
        raise _wrong(field, f"{NP_DTYPE} must be a string such as complex128, got {shown(np_dtype)}")
    return np_dtype


def _outputs(spec: KernelSpec, requested: Sequence[RequestedOutput]) -> Sequence[int]:
    """Positions of the requested outputs, in the order of the request; all if none is named. Raises InvalidArgument."""
    if not requested:
        return range(len(spec.outputs))
    positions = {output.name: index for index, output in enumerate(spec.outputs)}
    wanted: dict[int, None] = {}
    for output in requested:
        name = output.name[:64]
        if output.name not in positions:
            raise _wrong(name, f"kernel {spec.name} has no such output{near(name, positions)}")
        if positions[output.name] in wanted:
            raise _wrong(name, "the output is requested twice")
        for parameter in output.parameters:
            if parameter != _BINARY_DATA:
                raise _wrong(name, f"output parameter {parameter[:64]!r} is not served")
        wanted[positions[output.name]] = None
    return tuple(wanted)


def _check_array(declared: ArraySpec, dtype: str, shape: tuple[int, ...], axes: dict[str, tuple[int, str]]) -> None:
    if declared.dtypes and dtype not in declared.dtypes:
        _refuse_array(declared, dtype, shape)
    dims, sizes, many, lengths = one_by_one(declared.dims, shape)
    if len(dims) != len(sizes):
        _refuse_array(declared, dtype, shape)
    if many and many != ELLIPSIS:
        _bind_many(declared, many, lengths, axes)
    for dim, size in zip(dims, sizes, strict=True):
        if dim.isdecimal():
            if int(dim) != size:
                _refuse_array(declared, dtype, shape)
        elif dim != ANY_LENGTH:
            known, owner = axes.setdefault(dim, (size, declared.name))
            if known != size:
                raise _wrong(declared.name, f"axis {dim!r} has length {size}, but in {owner} it has {known}")


def _bind_many(declared: ArraySpec, dim: str, sizes: Sequence[int], axes: dict[str, tuple[int, str]]) -> None:
    """Check that axes under one `*name` agree in all arrays: one by one, and in their number."""
    for index, size in enumerate((len(sizes), *sizes)):
        known, owner = axes.setdefault(f"{dim}[{index}]", (size, declared.name))
        if known != size:
            raise _wrong(declared.name, f"axes {dim!r} are {list(sizes)}, but they differ in {owner}")


def _scalars(spec: KernelSpec, given: Mapping[str, Parameter]) -> Parameters:
    if not spec.scalars and not given:
        return {}
    parameters: Parameters = {}
    for declared in spec.scalars:
        if declared.name in given:
            read = _list if declared.many else _scalar
            parameters[declared.name] = read(declared, given[declared.name])
        elif declared.required:
            raise _wrong(declared.name, f"kernel {spec.name} requires this {declared.kind} parameter")
    _bound_strings(parameters)
    if len(parameters) < len(given):
        for name in given:
            if name not in parameters:
                _refuse_unknown(spec, name, "parameter")
    return parameters


def _bound_strings(parameters: Parameters) -> None:
    """Bound the str parameters and the lists, which go to the worker in one frame that must fit a datagram."""
    sizes = {
        name: len(value.encode()) if isinstance(value, str) else sum(map(value_bytes, value))
        for name, value in parameters.items()
        if isinstance(value, str | list)
    }
    together = sum(sizes.values())
    if together > MAX_STRING_BYTES:
        longest = max(sizes, key=sizes.__getitem__)
        kinds, instead = ("str parameters", "a BYTES array")
        if isinstance(parameters[longest], list):
            kinds, instead = "lists and str parameters", "an array"
        raise _wrong(longest, f"{kinds} have {together} bytes, the maximum is {MAX_STRING_BYTES}; send {instead}")


def _scalar(declared: ScalarSpec, given: Parameter) -> Value:
    value = scalar(given)
    came = type(value).__name__
    if declared.type == "float" and isinstance(value, int) and came == "int":
        if float(value) != value:
            raise _wrong(declared.name, f"wanted a parameter of type float, which cannot hold {value}")
        value, came = float(value), "float"
    if value is None or came != declared.type:
        raise _wrong(declared.name, f"wanted a parameter of type {declared.type}, got {_told(value)}")
    if declared.choices:
        declared.check_choice(value)
    return value


def _list(declared: ScalarSpec, given: Parameter) -> list[Value]:
    """Read a list from a string of JSON: the protocol's parameters hold no lists."""
    text = scalar(given)
    if not isinstance(text, str):
        raise _wrong(declared.name, f"wanted a string with a JSON list of {declared.type}, got {_told(text)}")
    # Bounded before its elements are looked at, for the event loop's sake.
    return declared.elements(text, MAX_STRING_BYTES // value_bytes("" if declared.type == "str" else 0))


def _told(value: Value | None) -> str:
    return "nothing" if value is None else f"the {type(value).__name__} {shown(value)}"


def _refuse_array(declared: ArraySpec, dtype: str, shape: tuple[int, ...]) -> None:
    wanted = " or ".join(declared.kinds) or "any dtype"
    raise _wrong(
        declared.name,
        f"wanted {wanted} of shape ({', '.join(declared.dims)}), got {dtype} of shape ({', '.join(map(str, shape))})",
    )


def _left_out(spec: KernelSpec, given: Collection[str], descriptor: Descriptor) -> tuple[int, ...]:
    """Positions of the optional arrays that are left out. Raises InvalidArgument for an unknown or a missing array."""
    declared = [array.name for array in spec.inputs]
    for name in given:
        if name not in declared:
            _refuse_unknown(spec, name, "array")
    missing = [(index, array) for index, array in enumerate(spec.inputs) if array.name not in given]
    for _, array in missing:
        if not array.optional:
            as_parameter = ", which was given as a parameter" if array.name in descriptor.request.parameters else ""
            raise _wrong(array.name, f"kernel {spec.name} requires this array{as_parameter}")
    return tuple(index for index, _ in missing)


def _others(spec: KernelSpec, left_out: Collection[int]) -> tuple[ArraySpec, ...]:
    return tuple(array for place, array in enumerate(spec.inputs) if place not in left_out)


def _refuse_unknown(spec: KernelSpec, name: str, kind: str) -> None:
    known = [array.name for array in spec.inputs] + [scalar.name for scalar in spec.scalars]
    if name in known:
        other = "parameter" if kind == "array" else "array"
        raise _wrong(name, f"kernel {spec.name} takes it as {other}, not as {kind}")
    raise _wrong(name[:64], f"kernel {spec.name} has no such {kind}{near(name, known)}")
