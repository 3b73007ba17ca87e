"""Conversion of a kernel's spec to the message that lanes carry, and back."""

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
        scalars=tuple(_scalar_spec(scalar) for scalar in kernel.scalars),
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
    return Array(name=spec.name, dtypes=spec.dtypes, dims=spec.dims)


def _array_spec(array: Array) -> ArraySpec:
    return ArraySpec(name=array.name, dtypes=tuple(array.dtypes), dims=tuple(array.dims))


def _scalar(spec: ScalarSpec) -> Scalar:
    message = Scalar(name=spec.name, type=spec.type)
    if spec.default is not None:
        message.default.CopyFrom(parameter(spec.default))
    return message


def _scalar_spec(message: Scalar) -> ScalarSpec:
    required = not message.HasField("default")
    return ScalarSpec(
        name=message.name,
        type=message.type,
        required=required,
        default=None if required else scalar(message.default),
    )
