"""Validation of a call's arguments against its kernel's signature, before the call waits for anything.

The dispatcher knows dtypes by name and axes by length. What only NumPy can see (the prefixes within BYTES), a worker
checks. Every error is an InvalidArgument that names the argument, what was wanted and what was given.
"""

from collections.abc import Collection, Mapping, Sequence

from unlatch.common.errors import InvalidArgument, near, shown
from unlatch.common.kernel.datatypes import NP_DTYPE, seen_by_numpy
from unlatch.common.kernel.parameters import Value, scalar
from unlatch.common.kernel.spec import ANY_LENGTH, ELLIPSIS, ArraySpec, KernelSpec, ScalarSpec, one_by_one
from unlatch.compute.call import Arguments
from unlatch.compute.ipc.frames import MAX_STRING_BYTES, Parameters
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
    if len(position) != len(spec.inputs) or any(array.name not in position for array in spec.inputs):
        _refuse_set(spec, position, descriptor)
    order: list[int] = []
    axes: dict[str, tuple[int, str]] = {}
    for declared in spec.inputs:
        found = position[declared.name]
        _check_array(declared, dtypes[found], shapes[found], axes)
        if spec.nonempty and 0 in shapes[found]:
            raise InvalidArgument(
                f"{declared.name}: wanted at least one element, got shape {list(shapes[found])}", field=declared.name
            )
        order.append(found)
    scalars = _scalars(spec, descriptor.request.parameters)
    return Arguments(lengths, dtypes, shapes, order, scalars, _outputs(spec, descriptor.request.outputs))


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
            parameters[declared.name] = _scalar(declared, given[declared.name])
        elif declared.required:
            raise _wrong(declared.name, f"kernel {spec.name} requires this {declared.type} parameter")
    _bound_strings(parameters)
    if len(parameters) < len(given):
        for name in given:
            if name not in parameters:
                _refuse_unknown(spec, name, "parameter")
    return parameters


def _bound_strings(parameters: Parameters) -> None:
    """Bound the str parameters, which go to the worker in one frame that must fit a datagram."""
    sizes = {name: len(value.encode()) for name, value in parameters.items() if isinstance(value, str)}
    together = sum(sizes.values())
    if together > MAX_STRING_BYTES:
        longest = max(sizes, key=sizes.__getitem__)
        raise _wrong(
            longest, f"str parameters have {together} bytes, the maximum is {MAX_STRING_BYTES}; send a BYTES array"
        )


def _scalar(declared: ScalarSpec, given: Parameter) -> Value:
    value = scalar(given)
    came = type(value).__name__
    if value is not None and came == declared.type:
        return value
    if declared.type == "float" and isinstance(value, int) and came == "int":
        if float(value) != value:
            raise _wrong(declared.name, f"wanted a parameter of type float, which cannot hold {value}")
        return float(value)
    raise _wrong(
        declared.name,
        f"wanted a parameter of type {declared.type}, got "
        + ("nothing" if value is None else f"the {came} {shown(value)}"),
    )


def _refuse_array(declared: ArraySpec, dtype: str, shape: tuple[int, ...]) -> None:
    wanted = " or ".join(declared.dtypes) or "any dtype"
    raise _wrong(
        declared.name,
        f"wanted {wanted} of shape ({', '.join(declared.dims)}), got {dtype} of shape ({', '.join(map(str, shape))})",
    )


def _refuse_set(spec: KernelSpec, given: Collection[str], descriptor: Descriptor) -> None:
    """Refuse arrays that are not the kernel's: name an unknown one, or else a missing one."""
    declared = [array.name for array in spec.inputs]
    for name in given:
        if name not in declared:
            _refuse_unknown(spec, name, "array")
    missing = next(name for name in declared if name not in given)
    as_parameter = ", which was given as a parameter" if missing in descriptor.request.parameters else ""
    raise _wrong(missing, f"kernel {spec.name} requires this array{as_parameter}")


def _refuse_unknown(spec: KernelSpec, name: str, kind: str) -> None:
    known = [array.name for array in spec.inputs] + [scalar.name for scalar in spec.scalars]
    if name in known:
        other = "parameter" if kind == "array" else "array"
        raise _wrong(name, f"kernel {spec.name} takes it as {other}, not as {kind}")
    raise _wrong(name[:64], f"kernel {spec.name} has no such {kind}{near(name, known)}")
