"""Conversion of a kernel's spec to the message that lanes carry, and back."""

from dataclasses import replace

from unlatch.common.kernel.lists import to_json
from unlatch.common.kernel.parameters import parameter, scalar
from unlatch.common.kernel.spec import ArraySpec, KernelSpec, ScalarSpec
from unlatch.protos.unlatch_pb2 import Array, Kernel, Scalar


def to_message(spec: KernelSpec) -> Kernel:
    """Convert a spec to a message."""
    return Kernel(
        name=spec.name,
        version=spec.version,
        doc=spec.doc,
        inputs=[_array(array) for array in spec.inputs],
        scalars=[_scalar(scalar) for scalar in spec.scalars],
        outputs=[_array(array) for array in spec.outputs],
        pure=spec.pure,
        batch=spec.batch,
        max_batch_size=spec.max_batch_size,
        timeout_seconds=spec.timeout_seconds or 0.0,
        memory_bytes=spec.memory_bytes or 0,
        nonempty=spec.nonempty,
        concurrency=spec.concurrency or 0,
    )


def from_message(kernel: Kernel) -> KernelSpec:
    """Convert a message to a spec."""
    return KernelSpec(
        name=kernel.name,
        version=kernel.version,
        doc=kernel.doc,
        inputs=tuple(_array_spec(array) for array in kernel.inputs),
        scalars=tuple(scalar_spec(scalar) for scalar in kernel.scalars),
        outputs=tuple(_array_spec(array) for array in kernel.outputs),
        pure=kernel.pure,
        batch=kernel.batch,
        max_batch_size=kernel.max_batch_size,
        timeout_seconds=kernel.timeout_seconds or None,
        memory_bytes=kernel.memory_bytes or None,
        nonempty=kernel.nonempty,
        concurrency=kernel.concurrency or None,
    )


def _array(spec: ArraySpec) -> Array:
    return Array(name=spec.name, dtypes=spec.dtypes, dims=spec.dims, optional=spec.optional, text=spec.text)


def _array_spec(array: Array) -> ArraySpec:
    return ArraySpec(
        name=array.name,
        dtypes=tuple(array.dtypes),
        dims=tuple(array.dims),
        optional=array.optional,
        text=array.text,
    )


def _scalar(spec: ScalarSpec) -> Scalar:
    message = Scalar(name=spec.name, type=spec.type, many=spec.many, choices=map(parameter, spec.choices))
    if spec.default is not None:
        default = to_json(spec.default) if isinstance(spec.default, tuple) else spec.default
        message.default.CopyFrom(parameter(default))
    return message


def scalar_spec(message: Scalar) -> ScalarSpec:
    """Convert the message of one scalar to its spec."""
    spec = ScalarSpec(
        name=message.name,
        type=message.type,
        required=not message.HasField("default"),
        default=None,
        choices=tuple(value for choice in message.choices if (value := scalar(choice)) is not None),
        many=message.many,
    )
    if spec.required:
        return spec
    default = scalar(message.default)
    return replace(spec, default=tuple(spec.elements(str(default))) if spec.many else default)
