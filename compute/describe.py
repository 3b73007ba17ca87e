"""A kernel's spec as its lane's callers get it."""

from common.parameters import parameter
from common.spec import ArraySpec, KernelSpec, ScalarSpec
from protos.unlatch_pb2 import Array, Kernel, Scalar


def described(spec: KernelSpec) -> Kernel:
    """The spec as a message."""
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
    )


def _array(spec: ArraySpec) -> Array:
    return Array(name=spec.name, dtypes=spec.dtypes, dims=spec.dims)


def _scalar(spec: ScalarSpec) -> Scalar:
    scalar = Scalar(name=spec.name, type=spec.type)
    if not spec.required and spec.default is not None:
        scalar.default.CopyFrom(parameter(spec.default))
    return scalar
