"""A call's arguments, held against its kernel's signature before the call waits for anything.

The front knows dtypes by name and axes by length; what only NumPy can see (the prefixes within BYTES) a worker checks.
Every refusal is an InvalidArgument that names the argument, what it should be and what came.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from common.datatypes import NP_DTYPE, seen_by_numpy
from common.errors import InvalidArgument, near
from common.parameters import Value, scalar
from common.spec import ANY_LENGTH, ELLIPSIS, ArraySpec, KernelSpec, ScalarSpec
from compute.wire import MOST_STRING_BYTES, Parameters
from protos.unlatch_pb2 import Descriptor, Parameter


@dataclass(slots=True)
class Arguments:
    """What a call gives its kernel. `order[i]` says which of the descriptor's tensors is the kernel's i-th array."""

    dtypes: list[str]
    shapes: list[tuple[int, ...]]
    order: list[int]
    parameters: Parameters


def check(spec: KernelSpec, descriptor: Descriptor) -> Arguments:
    """A descriptor's arguments as the kernel will get them. Raises InvalidArgument."""
    tensors = descriptor.request.tensors
    lengths = descriptor.lengths
    if len(lengths) != len(tensors):
        raise InvalidArgument(
            f"raw_input_contents: {len(tensors)} inputs are described, but the bytes of {len(lengths)} came",
            field="raw_input_contents",
        )
    position: dict[str, int] = {}
    dtypes: list[str] = []
    shapes: list[tuple[int, ...]] = []
    for index, tensor in enumerate(tensors):
        name = tensor.name
        if name in position:
            raise InvalidArgument(f"{name}: the array is given twice", field=name)
        position[name] = index
        np_dtype = tensor.parameters[NP_DTYPE].string_param if tensor.parameters else ""
        dtype, shape = seen_by_numpy(name[:64], tensor.datatype, tensor.shape, np_dtype, lengths[index])
        dtypes.append(dtype)
        shapes.append(shape)
    if len(position) != len(spec.inputs) or any(array.name not in position for array in spec.inputs):
        _refuse_set(spec, position, descriptor)
    order: list[int] = []
    axes: dict[str, tuple[int, str]] = {}
    for declared in spec.inputs:
        found = position[declared.name]
        _check_array(declared, dtypes[found], shapes[found], axes)
        order.append(found)
    return Arguments(dtypes, shapes, order, _scalars(spec, descriptor.request.parameters))


def _check_array(  # noqa: C901 (the axes in order, once: on every call's path)
    declared: ArraySpec, dtype: str, shape: tuple[int, ...], axes: dict[str, tuple[int, str]]
) -> None:
    if declared.dtypes and dtype not in declared.dtypes:
        _refuse_array(declared, dtype, shape)
    dims: Sequence[str] = declared.dims
    sizes: Sequence[int] = shape
    for index, dim in enumerate(dims):
        if dim == ELLIPSIS or dim[0] == "*":
            after = len(dims) - index - 1
            if len(shape) < index + after:
                _refuse_array(declared, dtype, shape)
            if dim != ELLIPSIS:
                _bind_many(declared, dim, shape[index : len(shape) - after], axes)
            dims = [*dims[:index], *dims[index + 1 :]]
            sizes = [*shape[:index], *shape[len(shape) - after :]]
            break
    if len(dims) != len(sizes):
        _refuse_array(declared, dtype, shape)
    for dim, size in zip(dims, sizes, strict=True):
        if dim.isdecimal():
            if int(dim) != size:
                _refuse_array(declared, dtype, shape)
        elif dim != ANY_LENGTH:
            known, owner = axes.setdefault(dim, (size, declared.name))
            if known != size:
                raise InvalidArgument(
                    f"{declared.name}: axis {dim!r} has length {size}, but in {owner} it has {known}",
                    field=declared.name,
                )


def _bind_many(declared: ArraySpec, dim: str, sizes: tuple[int, ...], axes: dict[str, tuple[int, str]]) -> None:
    """Axes under one `*name` agree as a whole; they are bound one by one, and their number too."""
    for index, size in enumerate((len(sizes), *sizes)):
        known, owner = axes.setdefault(f"{dim}[{index}]", (size, declared.name))
        if known != size:
            raise InvalidArgument(
                f"{declared.name}: axes {dim!r} are {list(sizes)}, which is not what they are in {owner}",
                field=declared.name,
            )


def _scalars(spec: KernelSpec, given: Mapping[str, Parameter]) -> Parameters:
    if not spec.scalars and not given:
        return {}
    parameters: Parameters = {}
    for declared in spec.scalars:
        if declared.name in given:
            parameters[declared.name] = _scalar(declared, given[declared.name])
        elif declared.required:
            raise InvalidArgument(
                f"{declared.name}: kernel {spec.name} needs this {declared.type} parameter", field=declared.name
            )
    _bound_strings(parameters)
    if len(parameters) < len(given):
        for name in given:
            if name not in parameters:
                _refuse_unknown(spec, name, "parameter")
    return parameters


def _bound_strings(parameters: Parameters) -> None:
    """They go to the worker in one frame, which must fit a datagram."""
    sizes = {name: len(value.encode()) for name, value in parameters.items() if isinstance(value, str)}
    together = sum(sizes.values())
    if together > MOST_STRING_BYTES:
        longest = max(sizes, key=sizes.__getitem__)
        raise InvalidArgument(
            f"{longest}: str parameters of {together} bytes are more than {MOST_STRING_BYTES}; send a BYTES array",
            field=longest,
        )


def _scalar(declared: ScalarSpec, given: Parameter) -> Value:
    value = scalar(given)
    came = type(value).__name__
    if value is not None and came == declared.type:
        return value
    if declared.type == "float" and came == "int" and value is not None:
        return float(value)
    raise InvalidArgument(
        f"{declared.name}: wanted a {declared.type} parameter, got "
        + ("nothing" if value is None else f"the {came} {value!r:.64}"),
        field=declared.name,
    )


def _refuse_array(declared: ArraySpec, dtype: str, shape: tuple[int, ...]) -> None:
    wanted = " or ".join(declared.dtypes) or "any dtype"
    raise InvalidArgument(
        f"{declared.name}: wanted {wanted} of shape ({', '.join(declared.dims)}), got {dtype} of shape"
        f" ({', '.join(map(str, shape))})",
        field=declared.name,
    )


def _refuse_set(spec: KernelSpec, given: Collection[str], descriptor: Descriptor) -> None:
    """The arrays that came are not the kernel's: say which is unknown, or else which is missing."""
    declared = [array.name for array in spec.inputs]
    for name in given:
        if name not in declared:
            _refuse_unknown(spec, name, "array")
    missing = next(name for name in declared if name not in given)
    as_parameter = ", which came as a parameter" if missing in descriptor.request.parameters else ""
    raise InvalidArgument(f"{missing}: kernel {spec.name} needs this array{as_parameter}", field=missing)


def _refuse_unknown(spec: KernelSpec, name: str, kind: str) -> None:
    known = [array.name for array in spec.inputs] + [scalar.name for scalar in spec.scalars]
    if name in known:
        other = "parameter" if kind == "array" else "array"
        raise InvalidArgument(f"{name}: kernel {spec.name} takes it as {other}, not as {kind}", field=name)
    raise InvalidArgument(f"{name[:64]}: kernel {spec.name} has no such {kind}{near(name, known)}", field=name[:64])
